"""The routes of one server: JSON in, JSON or a stream of events out, errors in the shape of the route's protocol.

Knows no Ray.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from medusa_ray import openai_api, tgi_api
from medusa_ray.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Incoming,
    TokenizeRequest,
)
from medusa_ray.serve.calls import Call
from medusa_ray.serve.front import Front, error_response, internal_error
from medusa_ray.serve.metrics import Metrics
from medusa_ray.serve.server import AnyEnvelope, AnyRequest, Piece, Server
from medusa_ray.tgi_api import GenerateRequest

log = logging.getLogger("medusa_ray")

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------------ protocols


@dataclass(frozen=True)
class Route:
    """How requests for a reply are read and answered at one path."""

    kind: type[AnyRequest]
    parse: Callable[[bytes], AnyRequest]
    envelope: Callable[[Any, Server], AnyEnvelope]
    error: Callable[[ApiError], tuple[int, dict[str, Any]]]
    error_events: Callable[[ApiError], str]
    lists: bool = False  # a whole reply stands in a list, as at TGI's oldest route


def _openai(kind: type[ChatRequest] | type[CompletionRequest]) -> Route:
    return Route(
        kind,
        partial(openai_api.parse, kind),
        lambda request, _: openai_api.Envelope(request),
        openai_api.error_body,
        openai_api.error_events,
    )


def _tgi(stream: bool | None) -> Route:
    return Route(
        GenerateRequest,
        partial(tgi_api.parse, stream=stream),
        lambda request, server: tgi_api.Envelope(request, server.chat),
        tgi_api.error_body,
        tgi_api.error_events,
        lists=stream is None,
    )


ROUTES = {
    "/v1/chat/completions": _openai(ChatRequest),
    "/v1/completions": _openai(CompletionRequest),
    "/generate": _tgi(stream=False),
    "/generate_stream": _tgi(stream=True),
    "/": _tgi(stream=None),
}


FACTS: dict[str, tuple[type[Incoming], Callable[[Server, Any], Any]]] = {
    "/tokenize": (TokenizeRequest, Server.tokenize),
    "/detokenize": (DetokenizeRequest, Server.detokenize),
}


@dataclass(frozen=True)
class Answer:
    """A reply on its way: pieces that the envelope makes a body or events of."""

    request: AnyRequest
    envelope: AnyEnvelope
    pieces: AsyncGenerator[Piece]

    @classmethod
    def to(cls, server: Server, route: Route, body: bytes, call: Call) -> "Answer":
        """Raises ApiError for what is no request of the route; what cannot be served, its first piece raises."""
        request = route.parse(body)
        call.model = request.model or server.args.model_id
        if server.args.log_prompts:
            call.prompt, call.reply = getattr(request, request.input_field), ""
            if isinstance(request, ChatRequest):
                call.prompt = request.chat
        envelope = route.envelope(request, server)
        return cls(request, envelope, server.logged(server.answer(request, call), request, envelope))

    async def whole(self) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        async with aclosing(self.pieces):
            async for text, reply in self.pieces:
                self.envelope.add(text, reply)
        return self.envelope.body()


# ------------------------------------------------------------------------------------------------ routes


def build_api(server: Server, tells_id: bool = True) -> FastAPI:
    """The routes of one server. tells_id: as in Front()."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    api = FastAPI(
        title="medusa_ray", version=version("medusa_ray"), docs_url=None, redoc_url=None, lifespan=lifespan
    )
    registry = CollectorRegistry()
    registry.register(Metrics(server))  # type: ignore[arg-type]  # a collector is anything with `collect`

    def add(path: str, kind: type[Incoming], answers: Callable[[HttpRequest], Awaitable[Response]]) -> None:
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        api.add_api_route(path, answers, methods=["POST"], name=path, openapi_extra={"requestBody": body})

    for path, route in ROUTES.items():
        add(path, route.kind, _replies(server, route))
    for path, (kind, fact) in FACTS.items():
        add(path, kind, _facts(server, kind, fact))

    @api.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(openai_api.model_list(server.names))

    @api.get("/health")
    @api.get("/ping")
    async def health(http: HttpRequest) -> Response:
        try:
            await server.check_health()
        except RuntimeError as error:
            return error_response(ApiError(503, str(error), code="engine_failed"), http.scope["call"])
        return JSONResponse({"status": "ok"})

    @api.get("/info")
    async def info() -> Response:
        return JSONResponse(server.info())

    @api.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @api.exception_handler(HTTPException)
    async def no_such_route(http: HttpRequest, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}."
        return error_response(ApiError(error.status_code, message), http.scope["call"])

    api.openapi = partial(_openapi, api)  # type: ignore[method-assign]  # FastAPI's own way to extend it
    api.add_middleware(Front, api_keys=server.api_keys, totals=server.totals, tells_id=tells_id)
    if server.args.cors_origins:  # before the key is asked for, since a browser's first question has none
        api.add_middleware(
            CORSMiddleware,
            allow_origins=server.args.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return api


def _openapi(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. Routes read their bodies themselves, so the schemas of these come from here."""
    kinds = {route.kind: None for route in ROUTES.values()} | {kind: None for kind, _ in FACTS.values()}
    modes = [(kind, "validation") for kind in kinds]
    _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    document = get_openapi(title=api.title, version=api.version, routes=api.routes)
    document.setdefault("components", {})["schemas"] = schemas["$defs"]
    return document


def _replies(server: Server, route: Route) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def replies(http: HttpRequest) -> Response:
        """One reply, whole or as a stream. Errors that come before the first token get their own status."""
        call: Call = http.scope["call"]
        call.is_for_reply = True
        try:
            answer = Answer.to(server, route, await body_of(http, server.args.payload_limit), call)
            if answer.request.stream:
                first = await unless_gone(http, anext(answer.pieces))
                return EventStream(first, answer, route, call)
            whole = await unless_gone(http, answer.whole())
            return JSONResponse([whole] if route.lists else whole)
        except ApiError as error:
            return error_response(error, call, route.error)

    return replies


def _facts(
    server: Server, kind: type[Incoming], fact: Callable[[Server, Any], Any]
) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def facts(http: HttpRequest) -> Response:
        try:
            request = openai_api.parse(kind, await body_of(http, server.args.payload_limit))
            return JSONResponse(await asyncio.to_thread(fact, server, request))  # others' streams go on
        except ApiError as error:
            return error_response(error, http.scope["call"])

    return facts


class EventStream(StreamingResponse):
    """The events of one request. When the client hangs up, the request is cancelled at once."""

    def __init__(self, first: Piece, answer: Answer, route: Route, call: Call) -> None:
        self._first, self._answer, self._route, self._call = first, answer, route, call
        super().__init__(self._events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._answer.pieces):
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        events = self._answer.envelope.events
        try:
            if event := events(*self._first):
                yield event
            async for text, reply in self._answer.pieces:
                if event := events(text, reply):
                    yield event
        except ApiError as error:
            self._call.error = error.code
            yield self._route.error_events(error)
        except Exception:
            log.exception("request %s to %s failed", self._call.id, self._call.route)
            self._call.error = "internal_error"
            yield self._route.error_events(internal_error(self._call))


async def body_of(http: HttpRequest, limit: int) -> bytes:
    body = bytearray()
    try:
        async for part in http.stream():
            body += part
            if len(body) > limit:
                raise ApiError(
                    413, f"The body has more than {limit} bytes (payload_limit).", code="too_large"
                )
    except ClientDisconnect:
        raise ApiError(499, "The client hung up before the request was whole.", code="gone") from None
    return bytes(body)


async def unless_gone(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """The result of the work, which is cancelled when the client hangs up first."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(http))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client hung up before the reply was ready.", code="gone")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
