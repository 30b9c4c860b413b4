"""A chat model behind an OpenAI-compatible endpoint as judge: a vLLM or SGLang server, or a hosted one."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qrealign.errors import JudgeError
from qrealign.judges.question import QUESTION, YES_OR_NO, Unread, settle_verdicts

KEY_VARIABLE = "QREALIGN_JUDGE_API_KEY"
_PATH = "/chat/completions"
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MOST_TOKENS = 1024  # one word for most models; a reasoning model thinks first
_LONGEST_ANSWER = 8000  # characters
_NOTE = "a chat model asked for one word"


class EndpointJudge:
    """Asks an endpoint about each answer, several at a time. Prompts and answers leave this machine for that server.

    A verdict that cannot be read counts as harmful, and `note` says how many there were.

    Args:
        url: up to the version, as in `http://localhost:8000/v1`, or whole up to `/chat/completions`.
        model: the model's name at that server.
        threads: requests under way at once.
        timeout: seconds to wait for one reply.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the second attempt; doubled each time, unless the server names a time.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        threads: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
    ) -> None:
        self.name = f"endpoint {model}"
        self.model = model
        self.url = url.rstrip("/").removesuffix(_PATH) + _PATH
        self.note = _NOTE
        self._unread = Unread()
        self._threads = threads
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff

    def harmful(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each answer does harm.

        Raises:
            JudgeError: the endpoint refuses the requests, cannot be reached, does not speak this protocol, or gives no
                verdict that can be read.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            futures = [pool.submit(self._ask, *pair) for pair in zip(prompts, answers, strict=True)]
            try:
                replies = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # one failure is enough: the rest would fail alike
                raise
        verdicts = settle_verdicts(replies, YES_OR_NO, self.model, self._unread)
        self.note = _NOTE + self._unread.remark()
        return verdicts

    def _ask(self, prompt: str, answer: str) -> str:
        """Return the words of one verdict."""
        question = QUESTION.format(prompt=prompt, answer=answer[:_LONGEST_ANSWER])
        reply = self._post(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": _MOST_TOKENS,
            }
        )
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise JudgeError(
                f"the judge at {self.url} replied without choices[0].message.content: give the URL of an "
                "OpenAI-compatible server"
            ) from None
        return content if isinstance(content, str) else ""

    def _post(self, body: dict[str, Any]) -> Any:
        """Return the parsed reply to one request, after as many attempts as it takes."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self._retries + 1):
            pause = self._backoff * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                failure = f"answered {error.code} {error.reason}: {_first_words(error)}"
                if error.code not in _RETRIED:
                    raise JudgeError(f"the judge at {self.url} {failure}; {_advice(error.code)}") from error
                pause = _asked_pause(error, pause)
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
                failure = f"cannot be reached ({getattr(error, 'reason', None) or error or type(error).__name__})"
            except (ValueError, RecursionError) as error:  # brackets without end are no reply either
                raise JudgeError(f"the judge at {self.url} did not reply with JSON: check the URL") from error
            if attempt < self._retries:
                time.sleep(pause)
        raise JudgeError(
            f"the judge at {self.url} {failure}, {self._retries + 1} times in a row: check the server and run again"
        )


def open_endpoint(spec: str) -> EndpointJudge:
    """Open the endpoint `URL#model`.

    Raises:
        JudgeError: no model is named, or the URL is none.
    """
    url, _, model = spec.partition("#")
    try:
        _ = urllib.parse.urlsplit(url).port  # read, it is checked
    except ValueError as error:
        raise JudgeError(f"judge {spec}: {url} is no URL ({error}): correct it") from error
    if not model:
        raise JudgeError(f"judge {spec}: name the server's model after a #, as in {url}#MODEL")
    return EndpointJudge(url, model)


def _first_words(error: urllib.error.HTTPError) -> str:
    """Return the beginning of what the server says about an error."""
    try:
        said = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    return " ".join(said.split())[:200] or "no explanation"


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"put the key into the environment variable {KEY_VARIABLE}"
    return "check the URL (it usually ends in /v1) and the model's name"


def _asked_pause(error: urllib.error.HTTPError, pause: float) -> float:
    """Return the seconds that the server asks to wait, at most a minute, or `pause`."""
    try:
        return min(max(0.0, float(error.headers.get("Retry-After", pause))), 60.0)
    except ValueError:  # a date
        return pause
