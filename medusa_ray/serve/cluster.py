"""Serve files -> applications that run on Ray Serve, and the URLs at which they answer."""

import logging
import socket
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatusOverview

from medusa_ray.config import ROUTER, ApplicationConfig, ResilientConfig, ServeConfig, Strict, UserError
from medusa_ray.serve.app import fast
from medusa_ray.serve.router import resilient

log = logging.getLogger("medusa_ray")


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


def application(app: ApplicationConfig) -> serve.Application:
    """The application with the file's overrides of its deployments."""
    options: dict[str, dict[str, Any]] = {}
    for override in app.deployments:
        given = override.model_dump(exclude_unset=True, exclude_none=True, exclude={"name"})
        if override.user_config:  # whose null is a value
            given["user_config"] = override.user_config.model_dump(exclude_unset=True)
        engine = app.engines.get(override.name)
        if engine and (override.num_replicas == "auto" or override.autoscaling_config):
            # Ray's own target, 2, would start a replica for a batch that is all but empty.
            scaling = given.get("autoscaling_config") or {}
            given["autoscaling_config"] = {"target_ongoing_requests": engine.max_batch_size, **scaling}
        options[override.name] = given
    if app.runtime_env:
        environment = {"runtime_env": app.runtime_env.model_dump(exclude_unset=True)}
        for name in (ROUTER, *app.engines):
            given = options.setdefault(name, {})
            given["ray_actor_options"] = environment | (given.get("ray_actor_options") or {})
    return resilient(app.args, options) if isinstance(app.args, ResilientConfig) else fast(app.args, options)


def deploy(config: ServeConfig, timeout_s: float = 300) -> dict[str, str]:
    """Runs every application on the initialised Ray and waits until all answer; returns their URLs by name.

    Raises UserError when the port is taken, before anything starts, or when an application cannot be served.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = config.http_options
    if not serve.status().proxies:
        _check_port_is_free(http.host, http.port)
    targets = [
        serve.RunTarget(
            application(app),
            app.name,
            app.route_prefix,
            _given(app.logging_config),
            app.external_scaler_enabled,
        )
        for app in config.applications
    ]
    try:
        serve.start(
            config.proxy_location,
            http.model_dump(),
            logging_config=_given(config.logging_config),
            tracing_config=_given(config.tracing_config),
            controller_options=_given(config.controller_options),
        )
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


def shutdown(timeout_s: float = 20) -> None:
    """Ends every application, replies under way after `timeout_s`. Ray Serve's own processes end with Ray."""
    for name in serve.status().applications:
        serve.delete(name, _blocking=False)
    deadline_s = time.monotonic() + timeout_s
    while serve.status().applications and time.monotonic() < deadline_s:
        time.sleep(0.1)


def _given(options: Strict | None) -> dict[str, Any] | None:
    """What the file says of these options; the rest is Ray Serve's."""
    return options.model_dump(exclude_unset=True) if options else None


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
