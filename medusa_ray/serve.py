"""Heads -> a token stream over HTTP: one Ray Serve application per engine, Medusa or baseline.

Ingress and engine share one replica (the *fast* shape), so a token crosses no other process before the proxy.
Everything but the last part is plain Python: the protocol can be tested without Ray.
"""

import asyncio
import logging
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import ray
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatusOverview
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from medusa_ray import openai_api
from medusa_ray.chat import Chat
from medusa_ray.config import ApplicationConfig, EngineConfig, ServeConfig, UserError
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.scheduler import QueueFull
from medusa_ray.openai_api import ApiError, ChatRequest, CompletionRequest, Envelope, Reply
from medusa_ray.traffic import TrafficLog

log = logging.getLogger("medusa_ray")

DEPLOYMENT = "Engine"  # the name that `deployments:` in a serve file overrides
FALLBACK_PORT = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"  # of Ray Serve's own proxy, when HAProxy stands before it
)
MAX_BODY_BYTES = 2 * 2**20
RETRY_AFTER_S = 1

Result = TypeVar("Result")
Piece = tuple[str, Reply]  # text that may be shown after a step, and the reply so far


class Server:
    """Checked requests -> replies of one engine. Knows neither HTTP nor Ray."""

    def __init__(
        self, engine: Engine, chat: Chat, args: EngineConfig, traffic: TrafficLog | None = None
    ) -> None:
        self.engine, self.chat, self.args, self.traffic = engine, chat, args, traffic
        self.names = [args.model_id, *args.aliases]
        self.num_skipped_tokens = 0  # tokens that came with another one in the same step
        self.num_iterations = 0  # steps of a request, its prefill included
        self.finished: Counter[str] = Counter()  # by finish reason

    @classmethod
    def load(cls, args: EngineConfig) -> "Server":
        """Raises ValueError or OSError for what cannot be served."""
        # First, since a hook that cannot be imported is found in no time, and a base takes minutes to load.
        traffic = TrafficLog(args.traffic_log) if args.traffic_log else None
        if args.threads:
            torch.set_num_threads(args.threads)
        device = args.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = Engine.load(
            args.base,
            args.heads,
            tree=None if args.tree == "file" else args.tree,
            device=device,
            dtype=args.dtype,
            max_batch_size=args.max_batch_size,
            max_total_tokens=args.max_total_tokens,
            compile=args.compile,
            shares_prefixes=args.shares_prefixes,
            max_waiting=args.max_queued_requests,
        )
        return cls(engine, Chat.load(args.base), args, traffic)

    async def answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Piece]:
        """The text of each step. Closing the generator cancels the request.

        Raises ApiError: before the first step for what cannot be served, later when the engine fails.
        """
        try:
            engine_request = self._admit(request)
            reply = Reply(
                self.chat.detokenizer(), request.stop, len(engine_request.prompt_ids), self.engine.num_nodes
            )
            stream = cast("AsyncGenerator[Delta]", self.engine.stream(engine_request))
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    self.num_iterations += 1
                    self.num_skipped_tokens += len(delta.token_ids) - 1
                    text = reply.push(delta)
                    if reply.finish_reason:
                        self.finished[reply.finish_reason] += 1
                    yield text, reply
                    if reply.finish_reason:
                        return
        except QueueFull as error:
            raise ApiError(429, f"{error}; try again in {RETRY_AFTER_S} s.", code="queue_full") from None
        except RuntimeError as error:  # the engine has failed
            raise ApiError(503, str(error), code="engine_failed") from None

    def logged(
        self, pieces: AsyncGenerator[Piece], request: ChatRequest | CompletionRequest, envelope: Envelope
    ) -> AsyncGenerator[Piece]:
        """The same pieces; with the last of them the chat goes to the traffic log, if that takes it."""
        if self.traffic is None or not self.traffic.samples(envelope.id):
            return pieces
        if isinstance(request, CompletionRequest):
            self.traffic.drop("text_completion")
        elif (request.model_extra or {}).get("store") is False:
            self.traffic.drop("opted_out")
        else:
            return _logged(self.traffic, pieces, request, envelope)
        return pieces

    def close(self) -> None:
        """Writes what the traffic log still holds. Takes seconds when storage is slow."""
        if self.traffic:
            self.traffic.close()

    def _admit(self, request: ChatRequest | CompletionRequest) -> Request:
        """The request as the engine takes it. Raises ApiError when it cannot be served, QueueFull when not now."""
        if request.model not in self.names:
            served = ", ".join(self.names)
            message = f"The model {request.model[:100]!r} does not exist here; served: {served}."
            raise ApiError(404, message, "model", "model_not_found")
        self.engine.check_room()  # a refusal under overload is not to cost a tokenisation
        prompt_ids = self._prompt_ids(request)
        engine_request = Request(
            prompt_ids,
            openai_api.num_new_tokens(request, len(prompt_ids), self.engine.max_total_tokens),
            ignore_eos=bool(request.ignore_eos),
            deadline_s=request.deadline_s,
            **request.settings,
        )
        try:
            self.engine.check(engine_request)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return engine_request

    def _prompt_ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(request, CompletionRequest):
            return self.chat.text_ids(request.prompt) if isinstance(request.prompt, str) else request.prompt
        try:
            return self.chat.prompt_ids(request.chat)
        except ValueError as error:  # the base has no template, or its template refuses these messages
            raise ApiError(400, str(error), "messages") from None

    def check_health(self) -> None:
        """Raises RuntimeError once the engine has failed; Ray Serve then replaces the replica."""
        if self.engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.engine.failure}")

    def info(self) -> dict[str, Any]:
        """What is served, and how: enough to label a benchmark of it."""
        engine, heads = self.engine, self.engine.heads
        parameter = next(engine.model.parameters())
        return {
            "model_id": self.args.model_id,
            "aliases": self.args.aliases,
            "base": self.args.base,
            "heads": self.args.heads,
            "num_heads": engine.num_heads,
            "head_layout": heads.layout if heads else None,
            "draft_vocab_size": heads.draft_vocab_size if heads else None,
            "tree_nodes": engine.num_nodes,
            "is_adaptive": engine.is_adaptive,
            "shares_prefixes": self.args.shares_prefixes,
            "mode": engine.mode,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "threads": torch.get_num_threads(),
            "max_batch_size": self.args.max_batch_size,
            "max_queued_requests": self.args.max_queued_requests,
            "max_total_tokens": engine.max_total_tokens,
            "logged_share": self.traffic.config.share if self.traffic else 0.0,
        }

    def collect(self) -> Iterator[Metric]:
        """Prometheus metrics of this replica, with vLLM's names and TGI's behind `medusa_ray_`."""
        totals, label = self.engine.counters, [self.args.model_id]

        def counter(name: str, help: str, values: Mapping[Any, float], *labels: str) -> Metric:
            family = CounterMetricFamily(f"medusa_ray_{name}", help, labels=["model_name", *labels])
            for more, value in values.items():
                family.add_metric([*label, *more], value)
            return family

        yield counter("prompt_tokens", "Prompt tokens processed.", {(): totals.num_prompt_tokens})
        yield counter("generation_tokens", "Tokens generated.", {(): totals.num_generated_tokens})
        yield counter("spec_decode_num_drafts", "Steps with guesses.", {(): totals.num_drafts})
        yield counter("spec_decode_num_draft_tokens", "Guesses.", {(): totals.num_draft_tokens})
        yield counter("spec_decode_num_accepted_tokens", "Right guesses.", {(): totals.num_accepted_tokens})
        per_position = {(str(i),): n for i, n in enumerate(totals.num_accepted_tokens_per_pos)}
        yield counter(
            "spec_decode_num_accepted_tokens_per_pos", "Right guesses by place.", per_position, "position"
        )
        finished = {(reason,): n for reason, n in self.finished.items()}
        yield counter("request_success", "Requests answered to their end.", finished, "finished_reason")
        skipped = SummaryMetricFamily(
            "medusa_ray_request_skipped_tokens",
            "Tokens of a step beyond its first; (sum + count) / count is tokens per step, prefills included.",
            labels=["model_name"],
        )
        skipped.add_metric(label, self.num_iterations, self.num_skipped_tokens)
        yield skipped
        for name, value in (("running", self.engine.num_running), ("waiting", self.engine.num_waiting)):
            name = f"medusa_ray_num_requests_{name}"
            gauge = GaugeMetricFamily(name, "Requests now.", labels=["model_name"])
            gauge.add_metric(label, value)
            yield gauge
        if self.traffic:
            dropped = {(reason,): n for reason, n in self.traffic.num_dropped.items()}
            yield counter("traffic_logged", "Chats in the log's files.", {(): self.traffic.num_logged})
            yield counter("traffic_dropped", "Sampled chats that are in none.", dropped, "reason")
            yield counter(
                "traffic_failed_writes", "Attempts to write a file.", {(): self.traffic.num_failed_writes}
            )


async def _logged(
    traffic: TrafficLog, pieces: AsyncGenerator[Piece], request: ChatRequest, envelope: Envelope
) -> AsyncGenerator[Piece]:
    texts: list[str] = []
    is_whole = False
    try:
        async with aclosing(pieces):
            async for text, reply in pieces:
                texts.append(text)
                if reply.finish_reason:
                    # Before it is sent: many a client hangs up on the last event, and nothing runs after that.
                    is_whole = True
                    messages = [*request.chat, {"role": "assistant", "content": "".join(texts)}]
                    traffic.add(
                        {
                            "id": envelope.id,
                            "messages": messages,
                            "model": request.model,
                            "created": envelope.created,
                            "finish_reason": reply.finish_reason,
                        }
                    )
                yield text, reply
    finally:
        if texts and not is_whole:
            traffic.drop("cut_off")


# -------------------------------------------------------------------------------------------------- HTTP


def build_api(server: Server) -> FastAPI:
    """The routes of one server, every error in OpenAI's shape."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    api = FastAPI(title="medusa_ray", openapi_url=None, lifespan=lifespan)
    registry = CollectorRegistry()
    registry.register(server)  # type: ignore[arg-type]  # a collector is anything with `collect`

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
            return _error(ApiError(503, str(error), code="engine_failed"))
        return JSONResponse({"status": "ok"})

    @api.get("/info")
    async def info() -> Response:
        return JSONResponse(server.info())

    @api.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @api.exception_handler(HTTPException)
    async def no_such_route(http: HttpRequest, error: HTTPException) -> Response:
        return _error(ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}."))

    return api


async def _respond(
    server: Server, http: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    """One reply, whole or as a stream. Errors that come before the first token get their own status."""
    try:
        request = openai_api.parse(kind, await _body(http))
        envelope = Envelope(request)
        pieces = server.logged(server.answer(request), request, envelope)
        if request.stream:
            first = await _unless_gone(http, anext(pieces))
            return EventStream(first, pieces, envelope)
        return JSONResponse(await _unless_gone(http, _whole(pieces, envelope)))
    except ApiError as error:
        return _error(error)


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


async def _body(http: HttpRequest) -> bytes:
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    return body


async def _unless_gone(http: HttpRequest, work: Awaitable[Result]) -> Result:
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


def _error(error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


# -------------------------------------------------------------------------------------------------- Ray Serve


@serve.ingress()
class Replica:
    """A server in a Ray Serve replica."""

    def __init__(self, args: EngineConfig) -> None:
        self.server = Server.load(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.server)

    def check_health(self) -> None:
        self.server.check_health()


deployment = serve.deployment(name=DEPLOYMENT)(Replica)


def build_app(args: EngineConfig) -> serve.Application:
    """What `import_path` of a serve file names. Replicas and resources are for the file's `deployments`."""
    return _bind(args)


def _bind(args: EngineConfig, **options: Any) -> serve.Application:
    # The engine itself refuses overload, in OpenAI's words; Ray Serve's own limits only stand behind that.
    limit = 2 * (args.max_batch_size + args.max_queued_requests)
    defaults = {
        "max_ongoing_requests": limit,
        "max_queued_requests": limit,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    return deployment.options(**{**defaults, **options}).bind(args)


def environment() -> dict[str, str]:
    """Variables for Ray Serve's processes that let clients reach a replica without a proxy: see `direct_url`.

    Each process reads them as it starts: set them before `ray.init`, and on each node before `ray start`. All works
    without them.
    """
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # among others, replicas listen at ports of their own
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # Ray's 30 s are for external load balancers
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray's 5 s are too few on a busy laptop
    }


def deploy(config: ServeConfig, timeout_s: float = 300) -> dict[str, str]:
    """Runs every application on the initialised Ray and waits until all answer; returns their URLs by name.

    Raises UserError when the port is taken, before anything starts, or when an application cannot be served.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = config.http_options
    if not serve.status().proxies:
        _check_port_is_free(http.host, http.port)
    targets = [
        serve.RunTarget(_application(app), app.name, app.route_prefix, config.logging_config or None)
        for app in config.applications
    ]
    try:
        serve.start(config.proxy_location, http.model_dump())
    except (RayActorError, TimeoutError):
        # Ray Serve gives up on a proxy that a busy machine starts slowly, but its controller starts another.
        log.warning("serve waits for a proxy that did not start in time")
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    deadline_s = time.monotonic() + timeout_s
    while pending := _not_running(config):
        if time.monotonic() > deadline_s:
            raise UserError(
                f"the applications {pending} do not run after {timeout_s:.0f} s. A replica needs a CPU, or "
                "what its ray_actor_options say; `ray status` shows what the cluster has left."
            )
        time.sleep(0.1)
    host = "127.0.0.1" if http.host == "0.0.0.0" else http.host
    base = f"http://{host}:{http.port}{http.root_path}"
    urls = {app.name: (base + app.route_prefix).rstrip("/") for app in config.applications}
    for url in urls.values():
        wait_for_route(f"{url}/health", deadline_s)
    return urls


def direct_url(url: str) -> str:
    """The same application at the port of its replica, where no Python proxy adds some 10 ms to each request.

    It is the URL itself when there is not just one replica, when that is on another node, or when Ray was started
    without `environment()`. A replica that is replaced gets another port: for benchmarks, not for bookmarks.
    """
    # Only the dashboard has a public way to these facts, and a local Ray runs without one.
    client = _get_global_client()
    assert client is not None  # without Ray Serve it raises
    groups = client.get_serve_details()["target_groups"]
    here, parts = ray.util.get_node_ip_address(), urlsplit(url)
    targets = [
        target for group in groups if group["route_prefix"] == parts.path for target in group["targets"]
    ]
    if [target["ip"] for target in targets] != [here]:
        return url
    return parts._replace(netloc=f"{parts.hostname}:{targets[0]['port']}").geturl()


def shutdown() -> None:
    """Ends every application. Ray Serve's own processes end with Ray."""
    for name in serve.status().applications:
        serve.delete(name)


def _application(app: ApplicationConfig) -> serve.Application:
    """The application with the file's overrides of its one deployment."""
    # What a first replica dies of, a wrong path say, would kill the second and third one too.
    options: dict[str, Any] = {"max_constructor_retry_count": 1}
    for override in app.deployments:
        if override.name != DEPLOYMENT:
            raise UserError(
                f"application {app.name} overrides a deployment named {override.name!r}, but its only one is "
                f"{DEPLOYMENT!r}."
            )
        options |= override.model_dump(exclude_none=True, exclude={"name"})
    if app.runtime_env:
        actor_options = options.get("ray_actor_options", {})
        options["ray_actor_options"] = {"runtime_env": app.runtime_env, **actor_options}
    return _bind(app.args, **options)


def _not_running(config: ServeConfig) -> list[str]:
    """Names of the applications that do not run yet. Raises UserError when one has failed."""
    names = [app.name for app in config.applications]
    overviews = {name: app for name, app in serve.status().applications.items() if name in names}
    for name, overview in overviews.items():
        if overview.status == "DEPLOY_FAILED":
            raise UserError(f"application {name} cannot be served: {_cause(overview)}")
    return [name for name in names if name not in overviews or overviews[name].status != "RUNNING"]


def _cause(overview: ApplicationStatusOverview) -> str:
    """The last line of the traceback that a replica died of."""
    messages = [overview.message, *(deployment.message for deployment in overview.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_port_is_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} is not free ({error.strerror}). Set http_options.port to another one."
            ) from error


def wait_for_route(url: str, deadline_s: float) -> None:
    """Proxies learn of a route only after its application runs."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise UserError(f"{url} does not answer: {error}.") from error
            time.sleep(0.1)
