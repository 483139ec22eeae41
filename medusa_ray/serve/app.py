"""What Ray Serve runs: a server in a replica.

Ingress and engine are together (the *fast* shape), so that a token crosses no other process before the proxy. router.py
has the other shape.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve

from medusa_ray.config import EngineConfig
from medusa_ray.serve.http import build_api
from medusa_ray.serve.scaling import WAITING_TOKENS
from medusa_ray.serve.server import RETRY_AFTER_S, Server

DEPLOYMENT = "Engine"  # the name that `deployments:` in a serve file overrides


class Replica:
    """A server in a Ray Serve replica."""

    def __init__(self, args: EngineConfig) -> None:
        self.server = Server.load(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.server)

    def check_health(self) -> None:
        self.server.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {WAITING_TOKENS: self.server.engine.num_waiting_tokens}


ingress = serve.deployment(name=DEPLOYMENT)(serve.ingress()(Replica))


def build_app(args: EngineConfig) -> serve.Application:
    """What `import_path` of a serve file names. Replicas and resources are for the file's `deployments`."""
    return fast(args, {})


def fast(args: EngineConfig, options: dict[str, dict[str, Any]]) -> serve.Application:
    """The application, with options by deployment."""
    return bind(ingress, limit_of(args), options.get(DEPLOYMENT, {}), args)


def limit_of(args: EngineConfig) -> int:
    """Requests that a replica may have, and as many may wait for one.

    The engine itself refuses overload, in OpenAI's words; Ray Serve's own limits only stand behind that.
    """
    return 2 * (args.max_batch_size + args.max_queued_requests)


def bind(deployment: serve.Deployment, limit: int, options: dict[str, Any], *args: Any) -> serve.Application:
    """The deployment with these options, and ours for those that are not given."""
    defaults = {
        "max_ongoing_requests": limit,
        "max_queued_requests": limit,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        "graceful_shutdown_wait_loop_s": 0.2,
        # For what still runs in a replica that is to go: Ray's 20 s would cut long streams.
        "graceful_shutdown_timeout_s": 120,
        # A replica that dies is replaced when its health is looked at next; Ray's 10 s are long for those who wait.
        "health_check_period_s": 2,
    }
    return deployment.options(**{**defaults, **options}).bind(*args)
