"""Writing the report's files."""

from __future__ import annotations

from pathlib import Path

from qrealign.files import write_json, write_text
from qrealign.report.html import build_html
from qrealign.report.json_report import build_json
from qrealign.report.markdown import build_markdown
from qrealign.report.model import RunReport


def write_report(report: RunReport, directory: Path) -> list[Path]:
    """Write `report.json`, `report.md` and `report.html` into `directory`, each whole or absent; return the paths."""
    paths = [directory / f"report.{suffix}" for suffix in ("json", "md", "html")]
    write_json(paths[0], build_json(report))
    write_text(paths[1], build_markdown(report))
    write_text(paths[2], build_html(report))
    return paths
