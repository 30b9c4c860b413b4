"""The server over HTTP: the protocol as OpenAI's own client speaks it, the limits, the key, clients that leave."""

from __future__ import annotations

import json
import socket
import time

import httpx
import openai
import pytest

from tests.helpers import tiny_tokenizer
from tests.unit.serve_helpers import LENGTH, Running, http, served_model, serving

TURN = [{"role": "user", "content": "Tell me about tea."}]
SAID = {"model": "tiny", "messages": TURN, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def running():
    with serving(max_queue=3, max_body_bytes=4096, request_timeout=20.0) as running:
        yield running


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client
    running.wait_idle()


def post(running: Running, body: object, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return http.post(running.url + path, content=content, headers=headers, **options)


def test_models_tell_the_verdict(client):
    model = client.models.list().data[0]
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", LENGTH)
    assert model.verdict["passed"] and "90.0 % → 1.0 %" in model.verdict["headline"]
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other/name")


def test_chat_whole_and_streamed_say_the_same(client):
    whole = client.chat.completions.create(**SAID)
    choice = whole.choices[0]
    assert choice.finish_reason == "length" and choice.message.role == "assistant" and choice.message.content
    prompt = len(tiny_tokenizer()("<s>[INST] Tell me about tea. [/INST]", add_special_tokens=False).input_ids)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 8)
    chunks = list(client.chat.completions.create(**SAID, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_have_seeds_of_their_own(client):
    options = {**SAID, "n": 3, "seed": 7, "temperature": 1.0}
    texts = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in client.chat.completions.create(**options).choices] == texts
    parts: dict[int, str] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
    assert [parts[index] for index in range(3)] == texts


def test_completions_continue_texts_and_ids(client):
    ids = tiny_tokenizer()("Once upon").input_ids
    options = {"model": "tiny", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    several = client.completions.create(prompt=["Once upon", "a time"], **options)
    assert [choice.index for choice in several.choices] == [0, 1]
    one = client.completions.create(prompt=ids, **options)
    assert one.choices[0].text == several.choices[0].text
    assert client.completions.create(prompt=[ids], **options).choices[0].text == one.choices[0].text
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(prompt="Once upon", stream=True, **options)
    )
    assert streamed == one.choices[0].text
    default = client.completions.create(model="tiny", prompt="x", extra_body={"ignore_eos": True})
    assert default.usage.completion_tokens == 16


def test_logprobs_in_both_forms(client):
    chat = client.chat.completions.create(**SAID, logprobs=True, top_logprobs=3).choices[0]
    tokens = chat.logprobs.content
    assert len(tokens) == 8 and all(token.logprob == token.top_logprobs[0].logprob < 0 for token in tokens)
    assert all(token.bytes is None or bytes(token.bytes).decode() == token.token for token in tokens)
    chunks = list(client.chat.completions.create(**SAID, logprobs=True, top_logprobs=3, stream=True))
    streamed = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens])
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**options, logprobs=2).choices[0]
    assert [len(text.logprobs.tokens), len(text.logprobs.token_logprobs), len(text.logprobs.text_offset)] == [5, 5, 5]
    assert all(1 <= len(top) <= 2 for top in text.logprobs.top_logprobs)
    assert client.completions.create(**options, logprobs=0).choices[0].logprobs.top_logprobs is None
    assert client.completions.create(**options).choices[0].logprobs is None


def test_stop_strings_end_a_stream_unseen(client):
    options = {**SAID, "max_tokens": 40}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = next(whole[i : i + 2] for i in range(6, len(whole)) if "\ufffd" not in whole[i : i + 2])
    chunks = list(client.chat.completions.create(**options, stop=[stop, "never seen"], stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)] and chunks[-1].choices[0].finish_reason == "stop"


def test_a_conversation_may_have_a_system_turn_and_parts(client):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And now?"},
    ]
    text = "<s><<Be brief.>>\n[INST] Hi there [/INST] Hello!</s>[INST] And now? [/INST]"
    found = client.chat.completions.create(**{**SAID, "messages": turns})
    assert found.usage.prompt_tokens == len(tiny_tokenizer()(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model": "gpt-4"}, "model", "not served here"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": LENGTH}, "messages", "longer than"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, None, "differ"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": 8}, "n", "more than the queue holds"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"top_logprobs": 2}, None, "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
        ({"frequency_penalty": 1.0}, "frequency_penalty", "no other value is implemented"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "no other value is implemented"),
        ({"tools": []}, "tools", "would not follow it"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "end with a user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages", "string"),
        ({"messages": [{"role": "user", "content": "x" * 2 * LENGTH}]}, "messages", "longer than"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"seed": 2**64}, "seed", "less than"),
    ],
)
def test_what_is_wrong_is_said_with_its_field(running, change, param, words):
    response = post(running, {"model": "tiny", "messages": TURN, "max_tokens": 2, **change})
    error = response.json()["error"]
    assert response.status_code == (404 if change.get("model") else 400), error
    assert words in error["message"] and error["type"] == "invalid_request_error" and error["param"] == param, error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": [999]}, "vocabulary"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [3] * LENGTH}, "longer than"),
        ({"prompt": [[3]] * 700, "n": 16}, "11200 answers are more than the queue holds"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_completions_lack_is_refused(running, change, words):
    response = post(running, {"model": "tiny", "prompt": "x", **change}, "/v1/completions")
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_neutral_values_are_taken(client):
    client.chat.completions.create(
        **{**SAID, "extra_body": {"ignore_eos": True, "logit_bias": {}, "store": False}},
        frequency_penalty=0.0,
        presence_penalty=0,
        user="me",
        response_format={"type": "text"},
        max_completion_tokens=8,
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop": ""}),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}),
        ("completions", {"prompt": 5}),
        ("completions", {"prompt": [-1]}),
    ],
)
def test_refusals_name_fields_and_no_insides(running, path, body):
    response = post(running, {"model": "tiny", **body}, f"/v1/{path}")
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and not any(part in message for part in ("function-", "[", " at 0x")), message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{" * 3000, b'{"model": NaN}', b"1" * 4000]
)
def test_bodies_that_are_no_request_are_refused(running, body):
    response = post(running, body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_errors_become_the_clients_exceptions(client, running):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**SAID, "max_tokens": LENGTH})
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**SAID, "model": "x"})
    assert post(running, b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert http.get(f"{running.url}/v1/chat/completions").json()["error"]["message"] == "Method Not Allowed"
    assert http.get(f"{running.url}/v1/nothing").status_code == 404


def test_a_body_that_is_too_large_is_refused_announced_or_not(running):
    large = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 5000}]}
    assert post(running, large).status_code == 413
    chunks = (part for part in [b'{"model": "' + b"x" * 3000, b"y" * 3000])
    headers = {"Content-Type": "application/json"}
    response = http.post(f"{running.url}/v1/completions", content=chunks, headers=headers)
    assert response.status_code == 413 and "4096 bytes" in response.json()["error"]["message"]
    announced = {"Content-Type": "application/json", "Content-Length": str(1 << 40)}
    with socket.create_connection(running.url.removeprefix("http://").split(":")) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **announced}.items())
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
        raw.settimeout(10)
        assert b" 413 " in raw.recv(4096).split(b"\r\n")[0]


def test_a_foreign_host_header_is_refused(running):
    for host, status in (("evil.example", 400), ("localhost:99", 200), ("[::1]:5", 200), ("LOCALHOST", 200)):
        assert http.get(f"{running.url}/health", headers={"Host": host}).status_code == status


def test_a_full_queue_says_when_to_come_back(running):
    running.wait_idle()
    streams = [
        http.stream(
            "POST",
            f"{running.url}/v1/completions",
            json={"model": "tiny", "prompt": "x", "max_tokens": 150, "stream": True, "ignore_eos": True},
        )
        for _ in range(4)
    ]
    for stream in streams:
        stream.__enter__()
    waiting = {"model": "tiny", "prompt": ["x"] * 3, "max_tokens": 150, "ignore_eos": True, "stream": True}
    first = None
    for _ in range(20):  # the slots are taken at once, yet a fast machine may free one between two calls
        response = post(running, {**waiting, "prompt": ["x"] * 4, "stream": False, "max_tokens": 1}, "/v1/completions")
        if response.status_code == 429:
            first = response
            break
    assert first is not None
    assert int(first.headers["Retry-After"]) >= 1 and first.json()["error"]["type"] == "rate_limit_error"
    for stream in streams:
        stream.__exit__(None, None, None)
    running.wait_idle()


def test_a_client_that_leaves_frees_its_slot(running):
    ended = running.server.metrics.text().decode()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True, "n": 2}
    with http.stream("POST", f"{running.url}/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    running.wait_idle(5)
    raw = socket.create_connection(running.url.removeprefix("http://").split(":"))
    content = json.dumps({**body, "stream": False}).encode()
    raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    time.sleep(0.02)
    raw.close()
    running.wait_idle(5)
    assert _cancelled(running.server.metrics.text().decode()) >= _cancelled(ended) + 2


def _cancelled(text: str) -> float:
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith('qrealign_answers_total{ended="cancelled"')
    )


def test_metrics_and_health_count_what_happened(running, client):
    client.chat.completions.create(**SAID)
    text = http.get(f"{running.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["qrealign_generated_tokens_total"]) >= 8
    assert float(values['qrealign_http_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values["qrealign_slots"]) == 4 and float(values["qrealign_slots_running"]) == 0
    assert float(values["qrealign_first_token_seconds_count"]) >= 1
    health = http.get(f"{running.url}/health").json()
    assert health == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0, "slots": 4}


def test_the_key_is_asked_for_where_it_matters():
    with serving(api_key="secret key") as running:
        for given, status in (
            (None, 401),
            ("secret key", 401),
            ("Bearer wrong", 401),
            ("Bearer \xe9", 401),
            ("Basic secret key", 401),
            ("Bearer secret key", 200),
            ("bearer secret key", 200),
        ):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert http.get(running.url + path, headers=headers).status_code == status, (given, path)
        assert {http.get(running.url + path).status_code for path in ("/", "/health")} == {200}
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client.models.list()


def test_time_is_up_as_a_status_or_as_an_event():
    with serving(request_timeout=0.4, body_timeout=0.2, slots=1) as running:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 150, "ignore_eos": True}
        runner = running.server.engine._runner
        decode = runner.decode
        runner.decode = lambda *arguments: (time.sleep(0.01), decode(*arguments))[1]
        response = post(running, body, "/v1/completions")
        assert response.status_code == 504 and response.headers["Retry-After"]
        text = post(running, {**body, "stream": True}, "/v1/completions").text
        assert '"code": "timed_out"' in text.split("\n\n")[-2] and "[DONE]" not in text
        with socket.create_connection(running.url.removeprefix("http://").split(":")) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 50\r\n\r\n{"
            )
            slow.settimeout(5)
            assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]
        running.wait_idle()


def test_a_model_without_a_template_takes_conversations_too():
    with serving(served_model("gemma2", chat_template=None)) as running:
        turns = [{"role": "system", "content": "Short."}, *TURN]
        body = {"model": "tiny", "messages": turns, "max_tokens": 1, "ignore_eos": True}
        text = "### Instruction:\nShort.\n\nTell me about tea.\n\n### Response:\n"
        usage = post(running, body).json()["usage"]
        assert usage["prompt_tokens"] == len(tiny_tokenizer()(text).input_ids)


def test_a_template_that_refuses_a_conversation_is_told():
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    with serving(served_model(chat_template=template)) as running:
        turns = [*TURN, {"role": "assistant", "content": "x"}, *TURN]
        response = post(running, {"model": "tiny", "messages": turns})
        assert response.status_code == 400 and "one turn only" in response.json()["error"]["message"]


def test_a_tokenizer_that_knows_more_than_the_model_cannot_break_it():
    served = served_model()
    served.encoder.tokenizer.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(20)]})
    with serving(served) as running:
        response = post(running, {"model": "tiny", "prompt": "a <x19>"}, "/v1/completions")
        assert response.status_code == 400 and "vocabulary" in response.json()["error"]["message"]


def test_a_crash_of_a_handler_is_an_answer_too(running):
    encoder = running.server.served.encoder
    encode, encoder.encode_conversation = encoder.encode_conversation, None
    response = post(running, {"model": "tiny", "messages": TURN})
    encoder.encode_conversation = encode
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
