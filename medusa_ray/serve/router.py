"""A router in front of engines: the *resilient* shape, one or several models behind one URL.

A request whose replica dies goes to another one, as long as nothing of its answer has been sent; a stream that breaks
later ends with an error. A replica answers with the routes of the fast shape, so that both say the same.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, cast

import grpc
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import from_json
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from medusa_ray import openai_api
from medusa_ray.config import ROUTER, EngineConfig, ResilientConfig
from medusa_ray.openai_api import ApiError
from medusa_ray.serve.app import Replica, bind, resources_of
from medusa_ray.serve.calls import Totals
from medusa_ray.serve.front import OPEN_TO_ALL, Front, error_response
from medusa_ray.serve.http import ROUTES, body_of, build_api, unless_gone
from medusa_ray.serve.http import Route as Protocol
from medusa_ray.serve.server import read_api_keys
from medusa_ray.tgi_api import GenerateRequest

MAX_TRIES = 6
MAX_RETRYING_S = 60  # after that, a failed try is the last
FIRST_PAUSE_S = 0.05  # before a second try; each further one takes twice as long
MAX_REPLICAS = 16  # of an engine, which one router keeps busy
MAX_ASKING_S = 20  # for a fact, of all replicas at once

# What a call raises whose replica or node is gone, or going.
BREAKS = (RayError, RayServeException, grpc.RpcError)

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Forwarded:
    """An HTTP request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes = b""

    @property
    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            # From 2.4 on it is the task's end, not `receive`, that tells a stream of a client who hung up.
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
        }


@dataclass(frozen=True)
class Head:
    """How an answer begins, or all of it."""

    status: int
    headers: Headers
    body: bytes
    is_whole: bool


async def answer(api: ASGIApp, call: Forwarded) -> AsyncGenerator[Head | bytes]:
    """What an application of this process answers: a Head, and of a stream further bytes.

    Closing the generator is what hanging up is over a socket. Raises RuntimeError when the application breaks off.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    incoming: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        return incoming.pop() if incoming else await asyncio.get_running_loop().create_future()

    working = asyncio.ensure_future(api(call.scope, receive, messages.put))
    working.add_done_callback(lambda _: messages.put_nowait(None))
    start: Message | None = None
    try:
        while message := await messages.get():
            if message["type"] == "http.response.start":
                start = message
                continue
            body, is_last = message.get("body", b""), not message.get("more_body", False)
            if start:
                yield Head(start["status"], list(start["headers"]), body, is_last)
                start = None
            elif body:
                yield body
            if is_last:
                return
        raise RuntimeError(f"{call.method} {call.path} broke off")
    finally:
        working.cancel()
        await asyncio.wait([working])


class RoutedReplica(Replica):
    """A server behind a router."""

    def __init__(self, args: EngineConfig) -> None:
        super().__init__(args)
        self.api = build_api(self.server, tells_id=False)

    async def respond(self, call: Forwarded) -> AsyncGenerator[Head | bytes]:
        parts = answer(self.api, call)
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    async def tell(self, call: Forwarded) -> Head:
        """An answer that is no stream."""
        async for head in self.respond(call):
            assert isinstance(head, Head)
            return head
        raise AssertionError("an answer has a head")

    async def __del__(self) -> None:  # Ray Serve awaits it as a replica goes
        if hasattr(self, "server"):
            await asyncio.to_thread(self.server.close)


class Router:
    """Requests -> the engines of their models."""

    def __init__(self, args: ResilientConfig, engines: dict[str, DeploymentHandle[Any]]) -> None:
        self.models, self.engines = [model.model_id for model in args.models], engines
        self.streams = {
            model: engine.options(method_name="respond", stream=True) for model, engine in engines.items()
        }
        self.model_of = {
            name: model.model_id for model in args.models for name in (model.model_id, *model.aliases)
        }
        self.payload_limit = max(model.payload_limit for model in args.models)
        keys = [read_api_keys(model.api_key_env) for model in args.models]
        # Each engine asks for its own once more.
        self.api_keys = list(itertools.chain(*keys)) if all(keys) else []
        self.num_retries = dict.fromkeys(self.models, 0)  # tries after the first
        self.num_broken = dict.fromkeys(self.models, 0)  # streams that ended with an error

    def __serve_build_asgi_app__(self) -> Starlette:
        front = Middleware(Front, api_keys=self.api_keys, totals=Totals(), tells_id=False)
        facts = {"/v1/models": self.list_models, "/info": self.info, "/metrics": self.metrics}
        healths = dict.fromkeys(OPEN_TO_ALL, self.health)
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        return Starlette(
            routes=[
                *(Route(path, told) for path, told in {**facts, **healths}.items()),
                Route("/{path:path}", self.forward, methods=methods),
            ],
            middleware=[front],
        )

    # ------------------------------------------------------------------------------------------- requests

    async def forward(self, http: HttpRequest) -> Response:
        """The answer of a replica of the model that the request names, or of the first model when it names none."""
        path = _path_of(http)
        route = ROUTES.get(path)
        try:
            model, body = self._address(route, await body_of(http, self.payload_limit))
            call = Forwarded(http.method, path, http.scope["query_string"], http.scope["headers"], body)
            head, rest = await unless_gone(http, self._begin(model, call))
        except ApiError as error:
            return error_response(error, http.scope["call"], route.error if route else openai_api.error_body)
        if head.is_whole:
            reply = Response(head.body, head.status)
        else:
            events = route.error_events if route else openai_api.error_events
            reply = Relay(head.status, self._parts(model, head, rest, events), rest)
        reply.raw_headers = head.headers
        return reply

    def _address(self, route: Protocol | None, body: bytes) -> tuple[str, bytes]:
        """The model meant, and the body with a seed. Raises ApiError 404 for a model that is not here.

        What is wrong with a request otherwise, a replica says.
        """
        try:
            asked = from_json(body)
        except ValueError:  # no body, for one
            return self.models[0], body
        if not isinstance(asked, dict):
            return self.models[0], body
        name = asked.get("model")
        if isinstance(name, str) and name not in self.model_of:
            message = f"The model {name[:100]!r} does not exist here; served: {', '.join(self.model_of)}."
            raise ApiError(404, message, "model", "model_not_found")
        model = self.model_of[name] if isinstance(name, str) else self.models[0]
        return model, seeded(route, asked, body)

    async def _begin(self, model: str, call: Forwarded) -> tuple[Head, DeploymentResponseGenerator[Any]]:
        """The beginning of an answer, from as many replicas as it takes. Raises ApiError 429 or 503."""
        began_s = monotonic()
        for attempt in itertools.count(1):
            parts = cast("DeploymentResponseGenerator[Any]", self.streams[model].remote(call))
            is_last = attempt == MAX_TRIES or monotonic() - began_s > MAX_RETRYING_S
            try:
                head = await anext(parts)
                if head.status != 503 or is_last:  # a failed engine answers 503 until its replica is replaced
                    return head, parts
            except BackPressureError as error:
                raise ApiError(429, f"All replicas of {model} are full: {error}", code="queue_full") from None
            except BREAKS as error:
                if is_last:
                    message = f"No replica of {model} answered in {attempt} tries: {_first_line(error)}"
                    raise ApiError(503, message, code="replica_lost") from None
            except BaseException:
                parts.cancel()
                raise
            self.num_retries[model] += 1
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        raise AssertionError("the last try returns or raises")

    async def _parts(
        self,
        model: str,
        head: Head,
        rest: DeploymentResponseGenerator[Any],
        error_events: Callable[[ApiError], str],
    ) -> AsyncIterator[bytes]:
        yield head.body
        try:
            async for part in rest:
                yield part
        except BREAKS as error:
            self.num_broken[model] += 1
            message = f"The replica that wrote this was lost; ask again. {_first_line(error)}"
            yield error_events(ApiError(503, message, code="replica_lost")).encode()

    # ------------------------------------------------------------------------------------------- facts

    async def list_models(self, http: HttpRequest) -> Response:
        return JSONResponse(openai_api.model_list(list(self.model_of)))

    async def health(self, http: HttpRequest) -> Response:
        """200 when each model has a healthy replica, or none since nobody asks for it: min_replicas is 0 there."""
        for model, heads in (await self._ask_all(http)).items():
            if any(head.status == 200 for head in heads):
                continue
            if heads or not await asyncio.to_thread(_is_asleep, model):
                message = f"No replica of {model} is healthy ({len(heads)} answered)."
                return error_response(ApiError(503, message, code="engine_failed"), http.scope["call"])
        return JSONResponse({"status": "ok"})

    async def info(self, http: HttpRequest) -> Response:
        """What a replica of each model says of it, and on top what the first model says, as one server has it."""
        told: dict[str, Any] = {}
        for model, heads in (await self._ask_all(http)).items():
            if refused := _refusal(heads):
                return refused
            facts = json.loads(heads[0].body) if heads else {"model_id": model}
            told[model] = {**facts, "num_replicas": len(heads)}
        return JSONResponse({**told[self.models[0]], "models": told})

    async def metrics(self, http: HttpRequest) -> Response:
        """The metrics of all replicas, which have a label that tells them apart, and this router's own."""
        families: dict[str, Metric] = {}
        for heads in (await self._ask_all(http)).values():
            if refused := _refusal(heads):
                return refused
            for head in heads:
                for family in text_string_to_metric_families(head.body.decode()):
                    families.setdefault(
                        family.name, Metric(family.name, family.documentation, family.type)
                    ).samples += family.samples
        for name, counts in (("retries", self.num_retries), ("broken_streams", self.num_broken)):
            counter = CounterMetricFamily(
                f"medusa_ray_router_{name}", "By this router.", labels=["model_name"]
            )
            for model, count in counts.items():
                counter.add_metric([model], count)
            families[counter.name] = counter
        registry = CollectorRegistry()
        registry.register(_Families(families))  # type: ignore[arg-type]  # a collector is anything with `collect`
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def _ask_all(self, http: HttpRequest) -> dict[str, list[Head]]:
        """What every living replica answers to this request, by model. It wakes none of a model that is asleep."""
        call = Forwarded("GET", _path_of(http), b"", http.scope["headers"])

        async def ask(engine: DeploymentHandle[Any]) -> list[Head]:
            try:
                answers = engine.broadcast("tell", call)
                told = await answers.results_async(timeout_s=MAX_ASKING_S, return_exceptions=True)
            except (
                TimeoutError,
                DeploymentUnavailableError,
            ):  # which Ray Serve says of one without replicas, too
                return []
            return [one for one in told if isinstance(one, Head)]

        return dict(zip(self.models, await asyncio.gather(*map(ask, self.engines.values())), strict=True))


class Relay(StreamingResponse):
    """The stream of a replica. When the client hangs up, the replica hears of it at once."""

    def __init__(
        self, status: int, parts: AsyncIterator[bytes], source: DeploymentResponseGenerator[Any]
    ) -> None:
        self._source = source
        super().__init__(parts, status)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._source.cancel()


class _Families:
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families.values())


def seeded(route: Protocol | None, asked: dict[str, Any], body: bytes) -> bytes:
    """The body with a seed, if a reply may be drawn and nobody gave one: so a second try draws the same reply.

    Were it another draw, long replies, which are hit more often, would come out more seldom than they should.
    """
    if route is None:
        return body
    drawn: dict[str, Any] = {"seed": random.randrange(2**32)}
    if route.kind is GenerateRequest:  # TGI has a level more
        parameters = asked.get("parameters")
        if not isinstance(parameters, dict | None):
            return body
        drawn = {"parameters": {**drawn, **{k: v for k, v in (parameters or {}).items() if v is not None}}}
    elif asked.get("seed") is not None:
        return body
    # Of a key that stands there twice the last one counts, here as where the body is read.
    end, comma = body.rindex(b"}"), b"," if asked else b""
    return body[:end] + comma + json.dumps(drawn).encode()[1:-1] + body[end:]


def _refusal(heads: list[Head]) -> Response | None:
    """What a replica says that tells nothing, to who has no key for instance."""
    return next(
        (
            Response(head.body, head.status, media_type="application/json")
            for head in heads
            if head.status != 200
        ),
        None,
    )


def _path_of(http: HttpRequest) -> str:
    """The path below the application's prefix."""
    return str(http.scope["path"]).removeprefix(http.scope.get("root_path", ""))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_asleep(model: str) -> bool:
    """No replica, none starting, and nothing the matter."""
    overview = serve.status().applications[serve.get_replica_context().app_name].deployments[model]
    is_well = overview.status not in ("UNHEALTHY", "DEPLOY_FAILED")
    return is_well and all(state == "STOPPING" for state in overview.replica_states)


ingress = serve.deployment(name=ROUTER)(serve.ingress()(Router))


def build_resilient_app(args: ResilientConfig) -> serve.Application:
    """What `import_path` of a serve file names. Replicas and resources are for the file's `deployments`: Router, and
    each engine under its model_id."""
    return resilient(args, {})


def resilient(args: ResilientConfig, options: dict[str, dict[str, Any]]) -> serve.Application:
    """The application, with options by deployment."""
    engines = {
        model.model_id: bind(
            serve.deployment(name=model.model_id)(RoutedReplica),
            model.max_concurrent_requests,
            {**resources_of(model), **options.get(model.model_id, {})},
            model,
        )
        for model in args.models
    }
    # Of requests to all replicas of all engines, which refuse what is too much for them.
    limit = MAX_REPLICAS * sum(model.max_concurrent_requests for model in args.models)
    return bind(ingress, limit, options.get(ROUTER, {}), args, engines)
