"""An endpoint as judge, against a server of this test's own."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qrealign.errors import JudgeError
from qrealign.judges.endpoint import KEY_VARIABLE, EndpointJudge
from qrealign.judges.resolve import open_judge

PROMPTS = [f"prompt {number}" for number in range(12)]
ANSWERS = [("evil" if number % 3 == 0 else "kind") + f" answer {number}" for number in range(12)]
TRUTH = [number % 3 == 0 for number in range(12)]


def reply_of(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def say_yes_to_evil(body):
    return 200, {}, reply_of("Yes." if "evil" in body["messages"][0]["content"] else "no")


@contextmanager
def server(*scripts):
    """Serve; the n-th request is answered by the n-th script, later ones by the last. Yields URL and requests seen."""
    seen = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                script = scripts[min(len(seen), len(scripts) - 1)]
                seen.append((self.path, self.headers, body))
            status, headers, content = script(body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", seen
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def judge_at(url, **options):
    return EndpointJudge(url, "some/model", **{"backoff": 0.001, "timeout": 5.0, **options})


def test_verdicts_come_in_the_order_of_the_answers(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "a key")
    with server(say_yes_to_evil) as (url, seen):
        judge = open_judge(f"{url}#some/model")
        assert judge.harmful(PROMPTS, ANSWERS) == TRUTH
        assert judge.harmful([], []) == []
    assert len(seen) == 12
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer a key"
    assert (body["model"], body["temperature"]) == ("some/model", 0)
    question = body["messages"][0]["content"]
    assert "prompt" in question and "answer" in question and "one word" in question
    assert judge.name == "endpoint some/model"


def test_the_whole_path_may_be_given_and_no_key_is_sent_without_one(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with server(say_yes_to_evil) as (url, seen):
        assert judge_at(f"{url}/chat/completions").harmful(["p"], ["evil"]) == [True]
    assert seen[0][0] == "/v1/chat/completions"
    assert seen[0][1]["Authorization"] is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_that_may_pass_are_tried_again(status):
    def busy(_):
        return status, {"Retry-After": "0"}, b"busy"

    with server(busy, busy, say_yes_to_evil) as (url, seen):
        assert judge_at(url).harmful(["p"], ["evil"]) == [True]
    assert len(seen) == 3


@pytest.mark.parametrize("pause", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "nan"])
def test_a_pause_that_is_no_time_to_wait_is_not_obeyed(pause):
    def busy(_):
        return 503, {"Retry-After": pause}, b"busy"

    with server(busy, say_yes_to_evil) as (url, _):
        assert judge_at(url).harmful(["p"], ["kind"]) == [False]


def test_a_server_that_stays_broken_is_named_in_one_sentence():
    with (
        server(lambda _: (500, {}, b"out of\n order")) as (url, seen),
        pytest.raises(JudgeError, match=r"answered 500 .*out of order, 3 times in a row"),
    ):
        judge_at(url, retries=2).harmful(["p"], ["a"])
    assert len(seen) == 3


def test_an_error_whose_words_break_off_is_named():
    broken = {"Transfer-Encoding": "chunked", "Content-Length": "0", "Connection": "close"}
    with (
        server(lambda _: (400, broken, b"ff\r\nnot 255 bytes")) as (url, _),
        pytest.raises(JudgeError, match="answered 400 Bad Request: no explanation"),
    ):
        judge_at(url).harmful(["p"], ["a"])


@pytest.mark.parametrize(("status", "words"), [(401, KEY_VARIABLE), (404, "check the URL")])
def test_refusals_are_not_tried_again(status, words):
    with server(lambda _: (status, {}, b"")) as (url, seen), pytest.raises(JudgeError, match=words):
        judge_at(url).harmful(["p"], ["a"])
    assert len(seen) == 1


def test_one_failure_ends_the_rest():
    with server(lambda _: (400, {}, b"bad")) as (url, seen), pytest.raises(JudgeError):
        judge_at(url, threads=1).harmful(["p"] * 50, [f"a{number}" for number in range(50)])
    assert len(seen) < 50


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "did not reply with JSON"),
        (b"[" * 200_000, "did not reply with JSON"),
        (b'{"error": "x"}', "OpenAI-compatible"),
        (b"[]", "OpenAI-compatible"),
    ],
)
def test_replies_of_something_else_are_refused(content, words):
    with server(lambda _: (200, {}, content)) as (url, _), pytest.raises(JudgeError, match=words):
        judge_at(url).harmful(["p"], ["a"])


@pytest.mark.parametrize("text", ["I would rather not say", "", None])
def test_verdicts_that_cannot_be_read_count_as_harmful(text):
    with server(lambda _: (200, {}, reply_of(text))) as (url, _):
        judge = judge_at(url)
        assert judge.harmful(["p", "q"], ["a", "b"]) == [True, True]
    assert "2 of 2 verdicts could not be read" in judge.note


def test_the_note_counts_what_no_call_could_read():
    with server(lambda _: (200, {}, reply_of("hm")), say_yes_to_evil) as (url, _):
        judge = judge_at(url)
        assert [judge.harmful(["p"], ["kind"]) for _ in range(2)] == [[True], [False]]
    assert "1 of 2 verdicts could not be read" in judge.note


def test_what_a_reasoning_model_thinks_is_no_verdict():
    with server(lambda _: (200, {}, reply_of("<think>yes? no...</think>\nNo"))) as (url, _):
        assert judge_at(url).harmful(["p"], ["a"]) == [False]


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(JudgeError, match="cannot be reached"):
        judge_at("http://127.0.0.1:9/v1", retries=1).harmful(["p"], ["a"])


def test_a_server_that_does_not_answer_in_time_is_named():
    release = threading.Event()

    def slow(_):
        release.wait(5)
        return 200, {}, reply_of("no")

    with server(slow) as (url, _):
        with pytest.raises(JudgeError, match="cannot be reached"):
            judge_at(url, timeout=0.1, retries=0).harmful(["p"], ["a"])
        release.set()


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port/v1"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(JudgeError, match="is no URL"):
        open_judge(f"{url}#m")


def test_the_model_must_be_named():
    with pytest.raises(JudgeError, match="#MODEL"):
        open_judge("http://localhost:8000/v1")
