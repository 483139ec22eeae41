"""The ways through Ray Serve to a replica -> what each costs per request and per token.

`compare` measures them on an application that runs. `python -m medusa_ray.demo.serve_paths` measures them with an
engine that takes no time, beside Ray Serve without our settings, and prints a table.
"""

import asyncio
import http.client
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from medusa_ray import serve as stage
from medusa_ray.config import EngineConfig, ResilientConfig
from medusa_ray.medusa.replies import Counters, Delta
from medusa_ray.medusa.scheduler import Request

ARGS = EngineConfig(model_id="instant", base="-")
NUM_TOKENS = 32
NUM_WARMUP = 3


def compare(url: str, model: str, num_requests: int = 40) -> dict[str, dict[str, float]]:
    """Figures of a running application by path."""
    return {
        "Ray Serve's proxy": measure(url, model, num_requests),
        "replica's own port": measure(stage.direct_url(url), model, num_requests),
    }


def measure(url: str, model: str, num_requests: int) -> dict[str, float]:
    """Medians in ms, over requests sent one after the other on one connection: of a whole reply of one token,
    of the first token of a stream, and of each further one."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(f"{parts.hostname}", parts.port, timeout=60)
    fixed = {"model": model, "prompt": "SELECT", "temperature": 0, "ignore_eos": True}

    def post(num_tokens: int, stream: bool) -> http.client.HTTPResponse:
        body = json.dumps({**fixed, "max_tokens": num_tokens, "stream": stream})
        connection.request("POST", f"{parts.path}/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse()

    figures: dict[str, list[float]] = {"request_ms": [], "ttft_ms": [], "tpot_ms": []}
    for turn in range(NUM_WARMUP + num_requests):
        started = time.perf_counter()
        post(1, stream=False).read()
        ended = time.perf_counter()
        arrived = [
            time.perf_counter() for line in post(NUM_TOKENS, stream=True) if line.startswith(b"data: {")
        ]
        if turn >= NUM_WARMUP:
            figures["request_ms"].append((ended - started) * 1e3)
            figures["ttft_ms"].append((arrived[0] - ended) * 1e3)
            figures["tpot_ms"].append((arrived[-1] - arrived[0]) * 1e3 / (NUM_TOKENS - 1))
    return {name: statistics.median(values) for name, values in figures.items()}


# ------------------------------------------------------------------------------------------- without a model


class Instant:
    """An engine, its chat and its detokenizer, none of which takes any time."""

    max_total_tokens, num_nodes, num_running, num_waiting, failure, counters = 512, 0, 0, 0, None, Counters()
    num_waiting_tokens, last_step_s = 0, math.inf  # always alive
    tokenizer, vocab_size, eos_ids = None, 1, frozenset[int]()

    def check_room(self, num: int) -> None:
        pass

    def check(self, request: Request) -> None:
        pass

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        for step in range(request.max_new_tokens):
            await asyncio.sleep(0)  # as for a real step, the event loop gets its turn
            yield Delta([0], "length" if step + 1 == request.max_new_tokens else None, step, [step])

    def text_ids(self, text: str) -> list[int]:
        return [0]

    def detokenizer(self) -> "Instant":
        return self

    def push(self, token_ids: list[int]) -> str:
        return "token "

    def finish(self) -> str:
        return ""


def instant_server() -> stage.Server:
    instant: Any = Instant()
    return stage.Server(instant, instant, ARGS)


class Replica:
    def __serve_build_asgi_app__(self) -> Any:
        return stage.build_api(instant_server())


class RoutedReplica(stage.RoutedReplica):
    def __init__(self) -> None:
        self.server = instant_server()
        self.api = stage.build_api(self.server, tells_id=False)

    async def reconfigure(self, user_config: Any, rank: Any) -> None:
        pass


def measure_without_model(settings: str) -> dict[str, dict[str, float]]:
    """Serves the instant engine in both shapes on a Ray of its own, with Ray Serve's settings or with ours."""
    os.environ.update(stage.environment() if settings == "ours" else {})
    import ray
    from ray import serve

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    port = stage.free_port()
    serve.start("HeadOnly", {"host": "127.0.0.1", "port": port})
    engine = serve.deployment(name="instant")(RoutedReplica).bind()
    router = serve.deployment(name="Router")(serve.ingress()(stage.Router))
    resilient = router.bind(ResilientConfig(models=[ARGS]), {"instant": engine})
    serve.run(
        serve.deployment(name="Engine")(serve.ingress()(Replica)).bind(), name="fast", route_prefix="/fast"
    )
    serve.run(resilient, name="resilient", route_prefix="/resilient")
    fast, routed = (f"http://127.0.0.1:{port}/{shape}" for shape in ("fast", "resilient"))
    of_routed = {"resilient shape": measure(routed, "instant", 40)}
    if settings == "ours":
        return {**compare(fast, "instant"), **of_routed}
    return {"Ray Serve's defaults": measure(fast, "instant", 40), **of_routed}


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(measure_without_model(sys.argv[1])))
        return
    print(f"{'path':24}{'request ms':>12}{'ttft ms':>12}{'tpot ms':>12}")
    for settings in ("default", "ours"):
        # A process each, since Ray Serve reads its environment once.
        command = [sys.executable, "-m", "medusa_ray.demo.serve_paths", settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        for path, figures in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"{path:24}" + "".join(f"{value:12.2f}" for value in figures.values()), flush=True)


if __name__ == "__main__":
    main()
