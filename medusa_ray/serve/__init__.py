"""Heads -> a token stream over HTTP, on Ray Serve.

A server (server.py) answers checked requests, http.py gives it routes, metrics.py numbers: plain Python, so that the
protocol can be tested without Ray. app.py makes it a Ray Serve application, router.py one that outlives the death of
its replicas, scaling.py says how many of them there should be, and cluster.py runs the applications of a file.
"""

from medusa_ray.serve.app import build_app
from medusa_ray.serve.cluster import (
    deploy,
    direct_url,
    environment,
    free_port,
    shutdown,
    wait_for_route,
)
from medusa_ray.serve.http import build_api
from medusa_ray.serve.router import RoutedReplica, Router, build_resilient_app
from medusa_ray.serve.server import Server

__all__ = [
    "RoutedReplica",
    "Router",
    "Server",
    "build_api",
    "build_app",
    "build_resilient_app",
    "deploy",
    "direct_url",
    "environment",
    "free_port",
    "shutdown",
    "wait_for_route",
]
