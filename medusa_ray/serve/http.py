"""The routes of one server: JSON in, JSON or a stream of events out, every error in OpenAI's shape. Knows no Ray."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from medusa_ray import openai_api
from medusa_ray.openai_api import ApiError, ChatRequest, CompletionRequest, Envelope
from medusa_ray.serve.metrics import Metrics
from medusa_ray.serve.server import RETRY_AFTER_S, Piece, Server

MAX_BODY_BYTES = 2 * 2**20

Result = TypeVar("Result")


def build_api(server: Server) -> FastAPI:
    """The routes of one server, every error in OpenAI's shape."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    api = FastAPI(title="medusa_ray", openapi_url=None, lifespan=lifespan)
    registry = CollectorRegistry()
    registry.register(Metrics(server))  # type: ignore[arg-type]  # a collector is anything with `collect`

    @api.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        return await _respond(server, http, ChatRequest)

    @api.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        return await _respond(server, http, CompletionRequest)

    @api.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(openai_api.model_list(server.names))

    @api.get("/health")
    async def health() -> Response:
        try:
            server.check_health()
        except RuntimeError as error:
            return error_response(ApiError(503, str(error), code="engine_failed"))
        return JSONResponse({"status": "ok"})

    @api.get("/info")
    async def info() -> Response:
        return JSONResponse(server.info())

    @api.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @api.exception_handler(HTTPException)
    async def no_such_route(http: HttpRequest, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}."))

    return api


async def _respond(
    server: Server, http: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    """One reply, whole or as a stream. Errors that come before the first token get their own status."""
    try:
        request = openai_api.parse(kind, await body_of(http))
        envelope = Envelope(request)
        pieces = server.logged(server.answer(request), request, envelope)
        if request.stream:
            first = await unless_gone(http, anext(pieces))
            return EventStream(first, pieces, envelope)
        return JSONResponse(await unless_gone(http, _whole(pieces, envelope)))
    except ApiError as error:
        return error_response(error)


async def _whole(pieces: AsyncGenerator[Piece], envelope: Envelope) -> dict[str, Any]:
    async with aclosing(pieces):
        texts = [(text, reply) async for text, reply in pieces]
    return envelope.body("".join(text for text, _ in texts), texts[-1][1])


class EventStream(StreamingResponse):
    """The events of one reply. When the client hangs up, the request is cancelled at once."""

    def __init__(self, first: Piece, pieces: AsyncGenerator[Piece], envelope: Envelope) -> None:
        self._first, self._pieces, self._envelope = first, pieces, envelope
        super().__init__(self._events(), media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        if event := self._envelope.events(*self._first):
            yield event
        try:
            async for text, reply in self._pieces:
                if event := self._envelope.events(text, reply):
                    yield event
        except ApiError as error:
            yield openai_api.error_events(error)


async def body_of(http: HttpRequest) -> bytes:
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    return body


async def unless_gone(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """The result of the work, which is cancelled when the client hangs up first."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(http))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client hung up before the reply was ready.")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)
