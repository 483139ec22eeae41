"""What Ray Serve runs: a server in a replica.

Ingress and engine are together (the *fast* shape), so that a token crosses no other process before the proxy.
"""

import logging
import threading
import time
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.metrics import Gauge

from medusa_ray.config import DEPLOYMENTS, REQUEST_TIMEOUT_S, ApplicationConfig, EngineConfig
from medusa_ray.serve import calls
from medusa_ray.serve.http import build_api
from medusa_ray.serve.metrics import Metrics
from medusa_ray.serve.server import RETRY_AFTER_S, Server

PUBLISH_EVERY_S = 5.0
DEREGISTRATION_S = 30  # for so long a replica that ends takes requests of proxies that do not know yet

(DEPLOYMENT,) = DEPLOYMENTS["medusa_ray.serve:build_app"]


@serve.ingress()
class Replica:
    """A server in a Ray Serve replica."""

    def __init__(self, args: EngineConfig) -> None:
        self.server = Server.load(args, replica=serve.get_replica_context().replica_tag)
        _log_to_stderr(calls.LOG)
        threading.Thread(target=_publish, args=(Metrics(self.server),), daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.server, tells_id=False)  # Ray Serve puts the x-request-id on responses itself

    async def check_health(self) -> None:
        await self.server.check_health()


deployment = serve.deployment(name=DEPLOYMENT)(Replica)


def build_app(args: EngineConfig) -> serve.Application:
    """What `import_path` of a serve file names. Replicas and resources are for the file's `deployments`."""
    return _bind(args)


def _bind(args: EngineConfig, **options: Any) -> serve.Application:
    # The engine itself refuses overload, in OpenAI's words; Ray Serve's own limits only stand behind that.
    limit = 2 * args.max_concurrent_requests
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
    return deployment.options(**{**defaults, **options}).bind(args)


def application(app: ApplicationConfig) -> serve.Application:
    """The application with the file's overrides of its one deployment."""
    options: dict[str, Any] = {}
    for override in app.deployments:
        options = override.model_dump(exclude_unset=True, exclude_none=True, exclude={"name"})
        if override.num_replicas == "auto" or override.autoscaling_config:
            # Ray's own target, 2, would start a replica for a batch that is all but empty.
            scaling = options.get("autoscaling_config") or {}
            options["autoscaling_config"] = {"target_ongoing_requests": app.args.max_batch_size, **scaling}
    if app.runtime_env:
        actor_options = options.get("ray_actor_options") or {}
        environment = {"runtime_env": app.runtime_env.model_dump(exclude_unset=True)}
        options["ray_actor_options"] = environment | actor_options
    return _bind(app.args, **options)


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
            labels = {
                name: value for name, value in sample.labels.items() if name != "replica"
            }  # Ray tells that
            if sample.name not in gauges:
                gauges[sample.name] = Gauge(sample.name, tag_keys=tuple(labels))  # type: ignore[arg-type]  # Ray means any length
            gauges[sample.name].set(sample.value, labels)
        time.sleep(PUBLISH_EVERY_S)
