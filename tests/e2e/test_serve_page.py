"""The page at / in a real browser: it streams, stops, says what went wrong, and talks to its own server alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import BROWSER, NO_BROWSER, Page, browser
from tests.unit.serve_helpers import Running, http, served_model, serving

pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)

_READY = "!document.getElementById('send').disabled"
_IDLE = f"document.querySelector('[aria-busy]') === null && {_READY}"
_NOTE = "document.querySelector('.turn:last-child .note')?.textContent ?? ''"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(served_model(max_length=256)) as running:
        yield running


@pytest.fixture(scope="module")
def page(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.open(running.url)
        page.wait(_READY)
        yield page


def ask(page: Page, text: str, tokens: int = 40) -> None:
    page.run(f"document.getElementById('max-tokens').value = {tokens}; document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def test_the_model_and_its_verdict_are_shown(page: Page) -> None:
    assert page.run("document.getElementById('name').textContent") == "tiny"
    assert page.run("document.getElementById('badge').textContent") == "Passed"
    assert "90.0 % → 1.0 %" in page.run("document.getElementById('headline').textContent")
    assert page.run("document.querySelectorAll('#reasons li').length") == 1


def test_an_answer_streams_and_the_conversation_goes_on(page: Page, running: Running) -> None:
    runner = running.server.engine._runner
    decode = runner.decode
    runner.decode = lambda *arguments: (time.sleep(0.02), decode(*arguments))[1]
    ask(page, "Tell me about <b>tea</b>.")
    page.wait("(document.querySelector('.turn.assistant[aria-busy] p')?.textContent ?? '').length > 3")
    partial = page.run("document.querySelector('.turn.assistant p').textContent")
    page.wait(_IDLE)
    runner.decode = decode
    whole = page.run("document.querySelector('.turn.assistant p').textContent")
    assert whole.startswith(partial) and len(whole) > len(partial)
    assert page.run("document.querySelector('.turn.user p').textContent") == "Tell me about <b>tea</b>."
    assert "tokens" in page.run(_NOTE) and "tokens/s" in page.run(_NOTE)
    assert page.run("document.activeElement.id") == "prompt"
    # What the page showed is what the server says to the same request.
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me about <b>tea</b>."}], "max_tokens": 40}
    reply = http.post(f"{running.url}/v1/chat/completions", json={**body, "temperature": 0}).json()
    assert reply["choices"][0]["message"]["content"] == whole
    ask(page, "And now?", 5)
    page.wait(f"{_IDLE} && document.querySelectorAll('.turn').length === 4")
    assert page.run("turns.map((turn) => turn.role).join()") == "user,assistant,user,assistant"


def test_stopping_frees_the_slot(page: Page, running: Running) -> None:
    runner = running.server.engine._runner
    decode = runner.decode
    runner.decode = lambda *arguments: (time.sleep(0.05), decode(*arguments))[1]
    page.run("document.getElementById('clear').click()")
    ask(page, "A long one", 120)
    page.wait("(document.querySelector('.turn.assistant[aria-busy] p')?.textContent ?? '').length > 1")
    page.run("document.getElementById('stop').click()")
    page.wait(_IDLE)
    runner.decode = decode
    assert page.run(_NOTE) == "stopped"
    running.wait_idle(5)


def test_what_the_server_refuses_is_told(page: Page) -> None:
    page.run("document.getElementById('clear').click()")
    ask(page, "x" * 300)
    page.wait(_IDLE)
    assert "longer than" in page.run(_NOTE) and page.run("document.querySelector('.turn.failed') !== null")
    assert page.run("turns.length") == 0  # it is not sent again with the next message
    page.complaints[:] = [text for text in page.complaints if "400" not in text]


def test_shift_enter_is_a_new_line(page: Page) -> None:
    page.run("document.getElementById('clear').click(); document.getElementById('prompt').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.run("document.getElementById('prompt').value") == "one\ntwo"
    assert page.run("document.querySelectorAll('.turn').length") == 0
    page.run("document.getElementById('prompt').value = ''")


def test_nothing_is_asked_of_anyone_else(page: Page, running: Running, tmp_path: Path) -> None:
    assert page.complaints == []
    assert all(url.startswith((running.url, "data:")) for url in page.requests if url != "about:blank")
    assert any(url.endswith("/v1/chat/completions") for url in page.requests)
    assert page.picture(tmp_path / "page.png").stat().st_size > 10000
    page.run("document.body.append(Object.assign(new Image(), { src: 'http://localhost:9/x.png' })); 1")
    page.wait("true")
    deadline = time.monotonic() + 5
    while not page.complaints and time.monotonic() < deadline:
        page.run("1")
    assert "Content Security Policy" in page.complaints[0]


def test_every_control_has_a_name_and_the_page_fits(page: Page) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    unnamed = [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node.get("role", {}).get("value") in ("textbox", "button", "spinbutton", "log", "heading")
        and not node.get("name", {}).get("value")
    ]
    assert unnamed == []
    for width in (1000, 380):
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), width


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    with serving(api_key="k") as running, browser(tmp_path / "profile") as page:
        page.open(running.url, dark=True)
        page.wait("!document.getElementById('key-section').hidden")
        assert page.run(_READY) is False and page.run("document.body.textContent.includes('90.0')") is False
        page.wait("document.activeElement.id === 'key'")
        page.type("wrong")
        page.press("Enter")
        page.wait("document.getElementById('badge').textContent === 'Wrong key'")
        page.type("k")
        page.press("Enter")
        page.wait(_READY)
        ask(page, "Hi", 3)
        page.wait(f"{_IDLE} && document.querySelectorAll('.turn').length === 2")
        assert "3 tokens" in page.run(_NOTE)
