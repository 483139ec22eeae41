"""What Ray Serve runs: a server in a replica.

Ingress and engine are together (the *fast* shape), so that a token crosses no other process before the proxy.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve

from medusa_ray.config import ApplicationConfig, EngineConfig, UserError
from medusa_ray.serve.http import build_api
from medusa_ray.serve.server import Server

DEPLOYMENT = "Engine"  # the name that `deployments:` in a serve file overrides


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


def application(app: ApplicationConfig) -> serve.Application:
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
