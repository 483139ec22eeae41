"""What Ray Serve runs: a server in a replica.

Ingress and engine are together (the *fast* shape), so that a token crosses no other process before the proxy. router.py
has the other shape.
"""

import gc
import logging
import threading
import time
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.metrics import Gauge

from medusa_ray import config
from medusa_ray.config import ENGINE, REQUEST_TIMEOUT_S, EngineConfig, GuesserConfig
from medusa_ray.serve import calls
from medusa_ray.serve.http import build_api
from medusa_ray.serve.metrics import Metrics
from medusa_ray.serve.scaling import WAITING_TOKENS
from medusa_ray.serve.server import RETRY_AFTER_S, Server
from medusa_ray.serve.shards import Followers

DEREGISTRATION_S = 30  # for so long a replica that ends takes requests of proxies that do not know yet
PUBLISH_EVERY_S = 5.0


class Replica:
    """A server in a Ray Serve replica."""

    def __init__(self, args: EngineConfig) -> None:
        followers = Followers(args) if args.tensor_parallel > 1 else None
        shards = followers.shards if followers else None
        self.server = Server.load(args, serve.get_replica_context().replica_tag, shards)
        gc.freeze()  # a large body's objects are no reason to look through all of torch's again
        if followers:
            followers.watch(self.server.engine)
        self.has_started = False
        _log_to_stderr(calls.LOG)
        threading.Thread(target=_publish, args=(Metrics(self.server),), daemon=True).start()

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: Any) -> None:
        """Serves with the heads and the tree of `user_config`, or of args where that names none.

        Ray Serve calls it at the start and at each change. It leaves null out, unless a rank is wanted. What is raised
        fails the start; of a replica that serves it would be the end, so it goes on with what it has and says why.
        """
        args = self.server.args
        try:
            asked = config.parse(GuesserConfig, user_config or {}, "user_config")
            heads, tree = (
                {**dict(args), **asked.model_dump(exclude_unset=True)}[key] for key in ("heads", "tree")
            )
            await self.server.swap(heads, tree)
        except Exception as error:
            if not self.has_started:
                raise
            self.server.refuse(error)
        self.has_started = True

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.server, tells_id=False)  # Ray Serve puts the x-request-id on responses itself

    async def check_health(self) -> None:
        await self.server.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {WAITING_TOKENS: self.server.engine.num_waiting_tokens}


ingress = serve.deployment(name=ENGINE)(serve.ingress()(Replica))


def build_app(args: EngineConfig) -> serve.Application:
    """What `import_path` of a serve file names. Replicas and resources are for the file's `deployments`."""
    return fast(args, {})


def fast(args: EngineConfig, options: dict[str, dict[str, Any]]) -> serve.Application:
    """The application, with options by deployment."""
    return bind(
        ingress, args.max_concurrent_requests, {**resources_of(args), **options.get(ENGINE, {})}, args
    )


def bind(
    deployment: serve.Deployment, max_concurrent_requests: int, options: dict[str, Any], *args: Any
) -> serve.Application:
    """The deployment with these options, and ours for those that are not given."""
    # The engine itself refuses overload, in OpenAI's words; Ray Serve's own limits only stand behind that.
    limit = 2 * max_concurrent_requests
    defaults = {
        "max_ongoing_requests": limit,
        "max_queued_requests": limit,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        "health_check_period_s": 3,  # the third in a row that fails ends a replica
        "health_check_timeout_s": 30,  # a long prompt holds a step up, which is no illness
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": REQUEST_TIMEOUT_S + DEREGISTRATION_S,
        # What a first replica dies of, a wrong path say, would kill the second and third one too.
        "max_constructor_retry_count": 1,
    }
    return deployment.options(**{**defaults, **options}).bind(*args)


def resources_of(args: EngineConfig) -> dict[str, Any]:
    """Options of an engine's deployment that its args ask for."""
    if args.tensor_parallel == 1:
        return {}
    # The replica is in the first bundle, a follower in each of the others.
    has_gpu = args.device == "cuda"
    bundle = {"CPU": 1} | ({"GPU": 1} if has_gpu else {})
    return {
        "placement_group_bundles": [bundle] * args.tensor_parallel,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(has_gpu)},
    }


def _log_to_stderr(log: logging.Logger) -> None:
    """Ray keeps it in a file of the worker, and tells who listens."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(logging.StreamHandler())


def _publish(metrics: Metrics) -> None:
    """Body of a thread: hands the metrics to Ray every few seconds, so that Prometheus gets those of all replicas.

    Behind Ray Serve's proxy, /metrics is that of whichever replica answers. All samples go as gauges, whose values Ray
    takes as they are: a counter of Ray's own would need differences, and its histogram each value.
    """
    gauges: dict[str, Gauge] = {}
    while True:
        for sample in (sample for family in metrics.collect() for sample in family.samples):
            labels = dict(sample.labels)
            labels.pop("replica")  # Ray tells that itself
            if sample.name not in gauges:
                tags: Any = tuple(labels)  # Ray's type has one only, but it means any number
                gauges[sample.name] = Gauge(sample.name, tag_keys=tags)
            gauges[sample.name].set(sample.value, labels)
        time.sleep(PUBLISH_EVERY_S)
