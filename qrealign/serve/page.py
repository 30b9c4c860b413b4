"""The page at /: one self-contained document, in the report's visual language, that talks to this server alone."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from qrealign.report.theme import STYLE


def build_page() -> tuple[str, str]:
    """Return the page and the Content-Security-Policy that it is sent with: its own script, its own server, no more."""
    folder = resources.files("qrealign.serve") / "page"
    script, style, body = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css", "page.html"))
    page = body.replace("{{style}}", STYLE + style).replace("{{script}}", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return page, policy
