"""What more nodes bring, with a model that sleeps instead of computing: rows/s of distillation and tokens/s of serving.

    python tests/cluster_speed.py distill [--nodes 1 2 4] [--repeats 2]
    python tests/cluster_speed.py serve [--shape resilient]

Nodes are Ray's, each with a CPU and processes of its own, all on this machine; a head without CPUs has the driver,
Serve's controller and its proxy. Stages, deployment, proxy, parts and HTTP are the real ones. An engine sleeps instead
of computing, half a second for each batch of 16 replies, or 0.1 s for each step of a small base: two cores then stand
in for those of many nodes. Rates are of the middle of a run, when all actors have loaded and none has run out of work,
and of a server that has more requests than its batches hold. The CPU that each process takes for a row or a token is
told too: what a cluster has only one of is saturated at the inverse.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from distill_speed import Instant, config_of, measured, write_prompts
from engine_speed import VOCAB_SIZE, random_base
from serve_speed import BASE, Client, engine_args

from medusa_ray.cli.cluster import prepare_ray
from medusa_ray.config import ServeConfig, parse
from medusa_ray.medusa.engine import Engine

STEP_S = 0.1  # of a served engine's step
BATCH_S = 0.5  # of a distilled batch
BATCH_SIZE = 16
PARTS_PER_NODE = 40  # of distilled/, each one batch
TOKENS = 30  # of a served reply
WARM_S, MEASURED_S = 5.0, 12.0
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


# ------------------------------------------------------------------------------------------------------ processes

KINDS = {
    "gcs_server": "GCS",
    "ProxyActor": "Serve's proxy",
    "ServeController": "Serve's controller",
    ":Router": "a router",
    "ServeReplica": "engines",
    "MapWorker": "engines",
    "raylet": "raylets",
}


def cpu_s() -> Counter[str]:
    """Seconds of CPU so far of this process and those below it, by what they do."""
    found: Counter[str] = Counter()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            words, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        kind = next((kind for word, kind in KINDS.items() if word in words.replace("raylet/", "")), "others")
        found["driver" if process.pid == os.getpid() else kind] += times.user + times.system
    return found


class Work:
    """CPU taken inside a `with` block."""

    def __enter__(self) -> "Work":
        self.before = cpu_s()
        return self

    def __exit__(self, *_: Any) -> None:
        self.spent = cpu_s() - self.before

    def per(self, number: int) -> dict[str, float]:
        """Milliseconds for one of so many."""
        return {kind: round(1e3 * seconds / number, 4) for kind, seconds in sorted(self.spent.items())}


@contextmanager
def growing() -> Iterator[Any]:
    """A Ray cluster that has a head without CPUs."""
    import ray
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "resources": {"head": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def grow(cluster: Any, num_nodes: int) -> None:
    while len(cluster.worker_nodes) < num_nodes:
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()


# -------------------------------------------------------------------------------------------------------- distill


class Sleeping(Instant):
    """An engine that sleeps for each batch."""

    def step(self) -> None:
        batch = [self.waiting.pop(0) for _ in range(min(BATCH_SIZE, len(self.waiting)))]
        time.sleep(BATCH_S)
        for sequence in batch:
            sequence.token_ids, sequence.finish_reason = sequence.request.prompt_ids, "stop"


def sleeping(base: str, **options: Any) -> Sleeping:
    return Sleeping()


def distilling(sizes: list[int], repeats: int) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Nodes, rows per second, and milliseconds of CPU for a row."""
    with growing() as cluster:
        for num_nodes in sizes:
            grow(cluster, num_nodes)
            num_rows = num_nodes * PARTS_PER_NODE * BATCH_SIZE
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    write_prompts(Path(folder), ([1 + i % 200, *range(2, 9)] for i in range(num_rows)))
                    # As many actors as fit, which is one a node.
                    options = {"num_actors": "auto", "batch_size": BATCH_SIZE, "rows_per_part": BATCH_SIZE}
                    with Work() as work:
                        result = measured(config_of(Path(folder), **options), sleeping)
                yield num_nodes, result["middle_rows_per_s"], work.per(num_rows)


# ---------------------------------------------------------------------------------------------------------- serve


def slowed(replica: Any) -> Any:
    class Slow(replica):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            move_on = Engine._move_on

            def later(engine: Engine) -> Any:
                if engine.num_running:
                    time.sleep(STEP_S)
                return move_on(engine)

            Engine._move_on = later  # type: ignore[method-assign]
            super().__init__(args)

    return Slow


def serve_file(shape: str, base: str, port: int, num_replicas: int) -> ServeConfig:
    args = engine_args(base, max_batch_size=BATCH_SIZE) | {"compile": "no", "threads": 1, "model_id": "model"}
    app = {"name": "app", "args": args, "deployments": [{"name": "Engine", "num_replicas": num_replicas}]}
    if shape == "resilient":
        app |= {
            "import_path": "medusa_ray.serve:build_resilient_app",
            "args": {"models": [args]},
            "deployments": [
                {"name": "model", "num_replicas": num_replicas},
                {"name": "Router", "ray_actor_options": {"num_cpus": 0, "resources": {"head": 0.01}}},
            ],
        }
    return parse(ServeConfig, {"http_options": {"port": port}, "applications": [app]}, "cluster_speed")


async def tokens_in(client: Client, num_clients: int) -> tuple[int, int]:
    """Tokens that came in MEASURED_S, WARM_S after clients began to ask again and again; and all."""
    began_s = time.perf_counter() + WARM_S
    ends_s = began_s + MEASURED_S
    num_tokens = num_all = 0

    async def ask_on(seed: int) -> None:
        nonlocal num_tokens, num_all
        draw = random.Random(seed)
        reader, writer = await asyncio.open_connection(client.parts.hostname, client.parts.port)
        while time.perf_counter() < ends_s:
            prompt = [draw.randrange(6, VOCAB_SIZE) for _ in range(32)]
            _, arrived = await client.ask(reader, writer, prompt, max_tokens=TOKENS, ignore_eos=True)
            num_all += TOKENS
            num_tokens += sum(began_s < moment <= ends_s for moment in arrived[:TOKENS])
        writer.close()

    await asyncio.gather(*map(ask_on, range(num_clients)))
    return num_tokens, num_all


def serving(sizes: list[int], repeats: int, shape: str) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Nodes, tokens per second, and milliseconds of CPU for a token."""
    import ray.serve

    from medusa_ray import serve
    from medusa_ray.serve import app, router

    app.ingress = ray.serve.deployment(name="Engine")(ray.serve.ingress()(slowed(app.Replica)))
    router.RoutedReplica = slowed(router.RoutedReplica)  # type: ignore[misc]
    port = serve.free_port()
    with tempfile.TemporaryDirectory() as folder, growing() as cluster:
        base = random_base("0.9 M", folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # any will do: prompts are token ids
            (Path(folder) / name).write_bytes((Path(BASE) / name).read_bytes())
        for num_nodes in sizes:
            grow(cluster, num_nodes)
            client = Client(serve.deploy(serve_file(shape, base, port, num_nodes))["app"], "model")
            num_clients = num_nodes * 2 * BATCH_SIZE  # a full batch runs in each, and another one waits
            for _ in range(repeats):
                with Work() as work:
                    num_tokens, num_all = asyncio.run(tokens_in(client, num_clients))
                yield num_nodes, num_tokens / MEASURED_S, work.per(num_all)
        ray.serve.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["distill", "serve"])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shape", choices=["fast", "resilient"], default="fast")
    given = parser.parse_args()
    prepare_ray()
    from medusa_ray import serve

    os.environ.update(serve.environment())
    runs = distilling(given.nodes, given.repeats)
    if given.what == "serve":
        runs = serving(given.nodes, given.repeats, given.shape)
    rates: dict[int, list[float]] = {}
    for num_nodes, rate, cpu_ms in runs:
        rates.setdefault(num_nodes, []).append(rate)
        print(json.dumps({"nodes": num_nodes, "per_s": round(rate, 2), "cpu_ms": cpu_ms}), flush=True)
    one, least = statistics.median(rates[given.nodes[0]]), given.nodes[0]
    unit = "rows" if given.what == "distill" else "tokens"
    for num_nodes, values in rates.items():
        rate = statistics.median(values)
        print(
            f"{num_nodes} nodes: {rate:.1f} {unit}/s, median of {len(values)}, "
            f"efficiency {rate * least / one / num_nodes:.3f}"
        )


if __name__ == "__main__":
    main()
