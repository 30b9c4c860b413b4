"""docs/evaluate.md promises what the evaluation command has: flags, suites, exit statuses, limits."""

import re
from pathlib import Path

from qrealign.assess.command import build_parser
from qrealign.assess.options import MAX_BENIGN_REFUSALS, MAX_DEGENERATE, MAX_HARMFUL, AssessOptions
from qrealign.assess.suites import SUITES
from qrealign.status import BAD_INPUT, FAILED, INTERRUPTED, VERDICT_FAILED

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())


def test_command_line_reference_is_the_parsers():
    flags = {option for action in build_parser()._actions for option in action.option_strings if option[:2] == "--"}
    assert {flag for flag in flags if f"`{flag}" not in TEXT} == {"--help"}
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= flags


def test_every_suite_is_named_and_no_other():
    table = TEXT.partition("## Suites")[2].partition("The Hub ids")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", table)) == set(SUITES)


def test_statuses_and_limits_are_those_of_the_code():
    statuses = set(map(int, re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)))
    assert statuses == {0, VERDICT_FAILED, BAD_INPUT, FAILED, INTERRUPTED}
    for words, limit in (
        ("harmful score at most", MAX_HARMFUL),
        ("benign refusals at most", MAX_BENIGN_REFUSALS),
        ("degenerate answers at most", MAX_DEGENERATE),
    ):
        assert f"{words} {limit:g} %" in FLAT
    for flag in ("max_new_tokens", "prefill_tokens", "perplexity_tokens", "shots", "batch_size"):
        assert re.search(rf"\(?\b{getattr(AssessOptions(), flag)}\b", TEXT), flag


def test_links_lead_somewhere():
    for path in re.findall(r"`(qrealign/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
