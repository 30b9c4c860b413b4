"""The report's page in a real browser: offline, without an error, readable in both themes and on a narrow screen."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from qrealign.report import write_report
from tests.browser import BROWSER, FLAGS, NO_BROWSER
from tests.sample_report import bare_report, full_report

_OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--log-level=0")
_DARK = "--blink-settings=preferredColorScheme=0"

pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)

# The page forbids scripts, so what the browser laid out is asked for on a copy without that policy.
_ASK = """<script>addEventListener("load", () => {
  const box = document.querySelector("table.scores").getBoundingClientRect();
  document.body.setAttribute("data-facts", JSON.stringify({
    width: box.width, height: box.height, rows: document.querySelectorAll("table.scores tbody tr").length,
    charts: [...document.querySelectorAll("svg.chart")]
      .map((svg) => svg.getBoundingClientRect()).filter((r) => r.width > 100 && r.height > 50).length,
    resources: performance.getEntriesByType("resource")
      .map((entry) => entry.name).filter((name) => !name.startsWith("data:")),
    methods: document.querySelectorAll("table.methods tbody tr").length,
    methodsBox: (document.querySelector("table.methods")?.getBoundingClientRect() ?? {}).width,
    page: document.documentElement.scrollWidth, window: innerWidth, text: getComputedStyle(document.body).color}));
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full_report(), tmp_path_factory.mktemp("report"))[2]


def _open(
    page: Path, profile: Path, *flags: str, size: tuple[int, int] = (1240, 1000)
) -> subprocess.CompletedProcess[str]:
    """Open a page in a fresh browser and wait for it to end."""
    assert BROWSER is not None
    command = [
        BROWSER,
        *FLAGS,
        *_OFFLINE,
        f"--user-data-dir={profile}",
        f"--window-size={size[0]},{size[1]}",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def _console(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def _facts(page: Path, folder: Path, *flags: str, size: tuple[int, int] = (1240, 1000)) -> dict[str, object]:
    """Return what the browser measured on a copy of the page that may run one script."""
    copy = folder / "asked.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy.write_text(text.replace("</body>", _ASK + "</body>"), encoding="utf-8")
    dom = _open(copy, folder / "profile", "--dump-dom", *flags, size=size).stdout
    found = re.search(r'data-facts="([^"]*)"', dom)
    assert found is not None
    return json.loads(found[1].replace("&quot;", '"'))


def test_opens_offline_without_an_error(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    assert _console(_open(page, tmp_path / "profile", f"--screenshot={picture}")) == []
    blank = tmp_path / "blank.html"
    blank.write_text("<!DOCTYPE html><title>blank</title>", encoding="utf-8")
    nothing = tmp_path / "blank.png"
    _open(blank, tmp_path / "profile-blank", f"--screenshot={nothing}")
    assert picture.stat().st_size > 10 * nothing.stat().st_size


def test_the_policy_and_this_test_would_notice_a_request(page: Path, tmp_path: Path) -> None:
    leaking = tmp_path / "leaking.html"
    leaking.write_text(
        page.read_text(encoding="utf-8").replace("</body>", '<img src="http://example.invalid/x.png"></body>'),
        encoding="utf-8",
    )
    assert any(
        "Content Security Policy" in line for line in _console(_open(leaking, tmp_path / "profile", "--dump-dom"))
    )


def test_table_and_charts_are_laid_out_and_nothing_is_loaded(page: Path, tmp_path: Path) -> None:
    facts = _facts(page, tmp_path)
    assert facts["rows"] == 6 and facts["width"] > 800 and facts["height"] > 300
    assert facts["charts"] >= 12 + 4
    assert facts["methods"] == 6 and 800 < facts["methodsBox"] <= facts["window"]
    assert facts["resources"] == []
    assert facts["page"] <= facts["window"]


def test_a_narrow_screen_scrolls_the_table_and_not_the_page(page: Path, tmp_path: Path) -> None:
    facts = _facts(page, tmp_path, size=(500, 900))
    assert facts["page"] <= facts["window"]


def test_dark_theme_follows_the_reader(page: Path, tmp_path: Path) -> None:
    light, dark = (tmp_path / name for name in ("light", "dark"))
    light.mkdir()
    dark.mkdir()
    ink = [
        int(number)
        for number in re.findall(r"\d+", str(_facts(page, light, "--blink-settings=preferredColorScheme=1")["text"]))
    ]
    glow = [int(number) for number in re.findall(r"\d+", str(_facts(page, dark, _DARK)["text"]))]
    assert sum(ink[:3]) < 200 < 600 < sum(glow[:3])


def test_a_run_without_scores_still_opens(tmp_path: Path) -> None:
    bare = write_report(bare_report(), tmp_path / "bare")[2]
    run = _open(bare, tmp_path / "profile", "--dump-dom")
    assert _console(run) == [] and "nothing is proven" in run.stdout
