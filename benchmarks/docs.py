"""Tables that benchmarks write into the documentation, between two markers that name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qrealign.errors import ConfigError
from qrealign.files import write_text


def markers(name: str) -> tuple[str, str]:
    """Return the lines before and after the table of this name."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put_table(path: Path, name: str, text: str) -> None:
    """Put text between the two markers of a document.

    Raises:
        ConfigError: the document cannot be read, or lacks the markers.
    """
    before, after = split_document(path, name)
    begin, end = markers(name)
    write_text(path, f"{before}{begin}\n\n{text}\n{end}{after}")


def split_document(path: Path, name: str) -> tuple[str, str]:
    """Return what stands before and after the markers; raises as `put_table` does."""
    begin, end = markers(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--docs {path} cannot be read: {error.strerror}") from error
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ConfigError(f"--docs {path} needs the lines {begin} and {end}: the tables go between them")
    return before, after


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return a Markdown table; `align` has a letter a column, "r" for right, and what it lacks is left."""
    rules = ["--:" if align[index : index + 1] == "r" else "---" for index in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rules, *rows))
