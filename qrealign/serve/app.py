"""The HTTP application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from qrealign import __version__
from qrealign.errors import ModelError
from qrealign.serve.engine import Engine
from qrealign.serve.exchange import Exchange, Publisher
from qrealign.serve.forms import ChatForm, Form, TextForm, Whole
from qrealign.serve.guard import Guard
from qrealign.serve.jobs import Answer, Job, Piece
from qrealign.serve.loading import ServedModel
from qrealign.serve.metrics import CONTENT_TYPE, ServerMetrics
from qrealign.serve.options import ServeOptions
from qrealign.serve.page import build_page
from qrealign.serve.protocol import ChatRequest, CompletionRequest
from qrealign.serve.replies import (
    ApiError,
    ChatCompletion,
    Completion,
    ErrorBody,
    Health,
    ModelList,
    ServedModelCard,
    Usage,
)
from qrealign.serve.runner import Runner
from qrealign.serve.sampling import SamplingSettings

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused"},
    "5XX": {"model": ErrorBody, "description": "Failed"},
}
_STREAM = {"content": {"text/event-stream": {"schema": {"description": "With stream: data events, [DONE] the last"}}}}


class Server:
    """The handlers of the endpoints, over one engine.

    Args:
        served: the model.
        runner: its slots.
        options: the limits.
    """

    def __init__(self, served: ServedModel, runner: Runner, options: ServeOptions) -> None:
        self.served = served
        self.options = options
        self.metrics = ServerMetrics(served.name)
        self._publisher = Publisher()
        self.engine = Engine(
            runner,
            stop_ids=served.stop_ids,
            max_queue=options.max_queue,
            publish=self._publisher,
            metrics=self.metrics,
        )
        self.metrics.watch(self.engine.load)
        self._max_length = runner.max_length
        # Templates and tokenizers are not for several threads at once, and a long prompt must not hold up the loop.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="qrealign-encode")
        self._token_text = lru_cache(maxsize=1 << 16)(
            lambda token_id: str(served.encoder.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        )

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the engine while the application is up."""
        self._publisher.attach()
        self.engine.start()
        yield
        self.engine.stop()
        await asyncio.to_thread(self.engine.join)
        self._encoding.shutdown(wait=False)

    async def health(self) -> Response:
        """Tell whether requests are taken: 200, or 503 while the server shuts down or when its device is lost."""
        load, refusal = self.engine.load(), self.engine.refusal
        body = Health(status=refusal or "ok", model=self.served.name, **load._asdict())
        return JSONResponse(body.model_dump(), 503 if refusal else 200)

    async def prometheus(self) -> Response:
        """Return the metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self) -> ModelList:
        """List the model."""
        return ModelList(data=[self._card()])

    async def model(self, name: str) -> ServedModelCard:
        """Describe the model."""
        self._check_model(name)
        return self._card()

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """Continue texts or token ids."""
        self._check_model(body.model)
        self._check_count(len(body.prompts) * (body.n or 1))
        prompts = await self._in_encoder(partial(self._prompt_ids, body.prompts))
        form = TextForm(self.served.name, self._token_text, logprobs=body.logprobs is not None)
        return await self._answer(request, body, prompts, form)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Write the next turn of a conversation."""
        self._check_model(body.model)
        self._check_count(body.n or 1)
        turns = [message.plain() for message in body.messages]
        try:
            ids = await self._in_encoder(partial(self.served.encoder.encode_conversation, turns))
        except ModelError as error:
            # The error's own sentence is for whoever owns the folder, and names it.
            reason = f"the chat template refuses this conversation: {error.__cause__}"
            raise ApiError(400, reason, param="messages") from error
        form = ChatForm(self.served.name, self._token_text, logprobs=bool(body.logprobs))
        return await self._answer(request, body, [ids], form)

    async def _answer(
        self, request: Request, body: CompletionRequest | ChatRequest, prompts: Sequence[Sequence[int]], form: Form
    ) -> Response:
        """Run the jobs of a request and return what they give, whole or as a stream."""
        exchange = Exchange(self.engine, request)
        for prompt in prompts:
            self._add_jobs(exchange, body, prompt)
        exchange.submit()
        usage = partial(_usage, sum(map(len, prompts)), exchange.jobs)
        batches = exchange.batches()
        try:
            if not body.stream:
                answers = [Whole() for _ in exchange.jobs]
                async for batch in batches:
                    for index, piece in batch:
                        answers[index].add(piece)
                exchange.close()
                return _json(form.whole(answers, usage()))
            # The first pieces come before the response begins, so that what goes wrong until then gets its own status.
            first = await anext(batches)
        except BaseException:
            exchange.close()
            raise
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _stream(exchange, first, batches, form, usage if with_usage else None)
        return StreamingResponse(stream, media_type="text/event-stream")

    def _add_jobs(self, exchange: Exchange, body: CompletionRequest | ChatRequest, prompt: Sequence[int]) -> None:
        """Add the answers to one prompt.

        Raises:
            ApiError: the prompt cannot be answered.
        """
        most = self._room(body, prompt)
        deadline = time.monotonic() + self.options.request_timeout
        for choice in range(body.n or 1):
            sampling = SamplingSettings(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=None if body.seed is None else body.seed + choice,
                max_tokens=most,
                stops=body.stops,
                top_logprobs=body.top_logprobs_wanted,
                ignore_eos=body.ignore_eos,
            )
            answer = Answer(self.served.decode, body.stops, prompt if body.continues_text else ())
            listener = partial(exchange.listen, len(exchange.jobs))
            exchange.jobs.append(
                Job(prompt=prompt, sampling=sampling, answer=answer, listener=listener, deadline=deadline)
            )

    def _room(self, body: CompletionRequest | ChatRequest, prompt: Sequence[int]) -> int:
        """Return the most tokens of an answer.

        Raises:
            ApiError: the prompt is empty, holds an id that is none of the model's, or does not fit with its answer.
        """
        wanted, room = body.tokens_wanted, self._max_length - len(prompt)
        if not prompt:
            raise ApiError(400, "the prompt is empty", param=body.prompt_field)
        if max(prompt) >= self.served.vocabulary:  # ids that were sent, or a tokenizer that knows more than the model
            raise ApiError(
                400,
                f"token id {max(prompt)} is not below the model's vocabulary of {self.served.vocabulary}",
                param=body.prompt_field,
            )
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"the prompt of {len(prompt)} tokens and an answer of {wanted or 1} are longer than the "
                f"{self._max_length} tokens that this server holds",
                param=body.prompt_field,
                code="context_length_exceeded",
            )
        return wanted or min(body.tokens_default or room, room)

    def _prompt_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Return the ids of a completion's prompts, with what the tokenizer puts in front of text."""
        tokenizer = self.served.encoder.tokenizer
        return [
            list(tokenizer(prompt, verbose=False).input_ids) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    async def _in_encoder(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            raise ApiError(
                404,
                f"model {name!r} is not served here, {self.served.name!r} is",
                param="model",
                code="model_not_found",
            )

    def _check_count(self, answers: int) -> None:
        """Refuse a request for more answers than can ever wait, before anything is kept of each."""
        if answers > self.options.max_queue + self.engine.load().slots:
            raise ApiError(400, f"{answers} answers are more than the queue holds: ask for fewer", param="n")

    def _card(self) -> ServedModelCard:
        return ServedModelCard(
            id=self.served.name,
            created=self.served.created,
            owned_by="qrealign",
            max_model_len=self._max_length,
            scheme=self.served.scheme,
            verdict=self.served.verdict,
        )


def build_app(served: ServedModel, runner: Runner, options: ServeOptions) -> FastAPI:
    """Return the application; its `state.server` holds the handlers and the engine, which runs while it is up."""
    server = Server(served, runner, options)
    app = FastAPI(
        title="qrealign",
        version=__version__,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=server.lifespan,
        responses=_ERRORS,
    )
    app.state.server = server
    keyed = [Security(HTTPBearer(auto_error=False))] if options.api_key is not None else []
    page, policy = build_page()

    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    app.add_api_route("/", index, include_in_schema=False)
    app.add_api_route("/health", server.health, response_model=Health)
    app.add_api_route("/metrics", server.prometheus, response_class=PlainTextResponse, dependencies=keyed)
    app.add_api_route("/v1/models", server.models, dependencies=keyed)
    app.add_api_route("/v1/models/{name:path}", server.model, dependencies=keyed)
    for path, handler, answer in (
        ("/v1/completions", server.completions, Completion),
        ("/v1/chat/completions", server.chat, ChatCompletion),
    ):
        app.add_api_route(
            path, handler, methods=["POST"], response_model=answer, responses={200: _STREAM}, dependencies=keyed
        )
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crashed)
    app.add_middleware(
        Guard,
        api_key=options.api_key,
        hosts=options.hosts,
        max_body_bytes=options.max_body_bytes,
        body_timeout=options.body_timeout,
        metrics=server.metrics,
        paths=frozenset(route.path for route in app.routes if hasattr(route, "path")),
    )
    return app


async def _stream(
    exchange: Exchange,
    first: list[tuple[int, Piece]],
    batches: AsyncIterator[list[tuple[int, Piece]]],
    form: Form,
    usage: Callable[[], Usage] | None,
) -> AsyncIterator[str]:
    """Yield server-sent events; what fails on the way becomes an event of its own, for the status is sent."""
    try:
        yield "".join(map(_event, form.opening(len(exchange.jobs))))
        batch: list[tuple[int, Piece]] | None = first
        while batch is not None:
            yield "".join(_event(form.part(index, piece)) for index, piece in batch)
            batch = await anext(batches, None)
        if usage is not None:
            yield _event(form.usage(usage()))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        exchange.close()


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _usage(read: int, jobs: Sequence[Job]) -> Usage:
    written = sum(job.generated for job in jobs)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """Say what is wrong with a body, in the first of perhaps many complaints."""
    assert isinstance(error, RequestValidationError)
    # Of a field that may be several things, the complaints about the thing that was meant.
    found = error.errors()
    first = next((one for one in found if not one["type"].endswith("_type")), found[0])
    # Of a union, a part names the alternative by pydantic's own description: no field has such a name.
    path = [str(part) for part in first["loc"][1:] if not re.search(r"[\[(]", str(part))]
    where, what = ".".join(path), str(first["msg"])
    if first["type"] == "json_invalid":
        return await _refused(request, ApiError(400, f"the body is no JSON: {first['ctx']['error']}"))
    if first["type"] == "extra_forbidden":
        what = "this server does not know the field, and would not follow it"
    elif first["type"] == "literal_error" or path[:1] == ["logit_bias"]:
        what = f"{what}; no other value is implemented"
    message = f"{where}: {what}" if where else f"the body is not usable: {what}"
    return await _refused(request, ApiError(400, message, param=path[0] if path else None))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = await _refused(request, ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _crashed(request: Request, _: Exception) -> Response:
    return await _refused(request, ApiError(500, "the server failed on this request; its log says why"))
