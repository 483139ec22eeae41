"""What HTTP costs, and Medusa beside its baseline and vLLM through it: one run, the arms in turns, a core for each.

    python tests/serve_speed.py overhead --run medusa-demo
    python tests/serve_speed.py arms --run medusa-demo [--vllm VENV]

--run is the folder of a demo's run, with heads/ and prompts/test. Whatever computes is bound to one core, and the
client to another, so that neither takes what the other is measured by; Ray's own processes run where they like. The
client reads streams and does nothing else: each request has a temperature of 0 and ends where the base ends it.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peers
import psutil
import pyarrow.parquet as pq
import torch
from engine_speed import VOCAB_SIZE, random_base

from medusa_ray import exchange, provenance
from medusa_ray.cli.cluster import cluster, prepare_ray
from medusa_ray.config import ServeConfig, parse
from medusa_ray.demo.quality import BASE
from medusa_ray.medusa.engine import Engine

MAX_NEW_TOKENS, MAX_TOTAL_TOKENS = 128, 512
SERVER_CORE, CLIENT_CORE = 0, 1
NUM_SINGLE = 150  # requests one after the other, of which the medians are taken

Prompts = Sequence[list[int]]
Arm = Callable[[Prompts, int], tuple[int, float]]  # prompts and how many at a time -> tokens and seconds


# ------------------------------------------------------------------------------------------------------ client


class Client:
    """Connections to one server, as many as requests are wanted at a time."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model, self.parts = url, model, urlsplit(url)

    def __call__(self, prompts: Prompts, concurrency: int) -> tuple[int, float]:
        return asyncio.run(self._all(prompts, concurrency))

    async def _all(self, prompts: Prompts, concurrency: int) -> tuple[int, float]:
        waiting, num_tokens = iter(prompts), 0

        async def answer() -> None:
            nonlocal num_tokens
            reader, writer = await asyncio.open_connection(self.parts.hostname, self.parts.port)
            for prompt in waiting:
                num, _ = await self.ask(reader, writer, prompt)  # others add to the sum meanwhile
                num_tokens += num
            writer.close()

        started = time.perf_counter()
        await asyncio.gather(*(answer() for _ in range(concurrency)))
        return num_tokens, time.perf_counter() - started

    async def ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prompt: list[int], **fields: Any
    ) -> tuple[int, list[float]]:
        """Tokens of the reply, and when each of its events came."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        fields = {"max_tokens": MAX_NEW_TOKENS, "temperature": 0, **stream, **fields}
        body = json.dumps({"model": self.model, "prompt": prompt, **fields}).encode()
        head = (
            f"POST {self.parts.path}/v1/completions HTTP/1.1\r\nHost: {self.parts.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        headers = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status:
            raise RuntimeError(f"{self.url} answered {status!r}: {await reader.read(2000)!r}")
        text, arrived = b"", []
        if length := re.search(rb"content-length: (\d+)", headers, re.IGNORECASE):
            text = await reader.readexactly(int(length[1]))
        else:
            while size := int(await reader.readline(), 16):
                text += await reader.readexactly(size)
                arrived.append(time.perf_counter())
                await reader.readexactly(2)
            await reader.readexactly(2)
        return int(re.findall(rb'"completion_tokens": ?(\d+)', text)[-1]), arrived


# ---------------------------------------------------------------------------------------------------- in process


def _compute(pipe: Connection, settings: dict[str, Any]) -> None:
    """Body of the process of an engine without a server. Gets prompts and settings, sends tokens and seconds."""
    os.sched_setaffinity(0, {SERVER_CORE})
    torch.set_num_threads(1)
    engine = Engine.load(**settings)
    pipe.send(None)
    while True:
        try:
            prompts, concurrency, options = pipe.recv()
        except EOFError:  # nobody has more to ask
            return
        started = time.perf_counter()
        done = []
        for at in range(0, len(prompts), len(prompts) if concurrency > 1 else 1):
            done += engine.generate(prompts[at:] if concurrency > 1 else prompts[at : at + 1], **options)
        pipe.send((sum(len(reply.token_ids) for reply in done), time.perf_counter() - started))


class InProcess:
    """An engine in a process of its own, with as many rows as requests are wanted at a time."""

    def __init__(self, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=_compute, args=(theirs, settings), daemon=True).start()
        self.pipe.recv()

    def __call__(self, prompts: Prompts, concurrency: int, **options: Any) -> tuple[int, float]:
        self.pipe.send((prompts, concurrency, {"max_new_tokens": MAX_NEW_TOKENS, **options}))
        return self.pipe.recv()


# ------------------------------------------------------------------------------------------------------- servers


@contextmanager
def serving(arms: dict[str, dict[str, Any]]) -> Iterator[dict[str, dict[str, str]]]:
    """URLs of applications on Ray Serve by arm and path to them; args of each arm's engine by its name."""
    prepare_ray()
    import ray.serve

    from medusa_ray import serve as stage

    os.environ.update(stage.environment())
    config = parse(
        ServeConfig,
        {
            "http_options": {"port": stage.free_port()},
            "applications": [
                {
                    "name": arm,
                    "route_prefix": f"/{arm}",
                    "import_path": "medusa_ray.serve:build_app",
                    "args": {"model_id": arm, "max_total_tokens": MAX_TOTAL_TOKENS, "threads": 1, **args},
                }
                for arm, args in arms.items()
            ],
        },
        "serve_speed",
    )
    with cluster():
        urls = stage.deploy(config)
        for process in psutil.Process().children(recursive=True):
            if any("ServeReplica" in word for word in process.cmdline()):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {SERVER_CORE})
        yield {
            arm: {"replica's port": stage.direct_url(url), "Serve's proxy": url} for arm, url in urls.items()
        }
        ray.serve.shutdown()


def engine_args(base: str, **more: Any) -> dict[str, Any]:
    common = {"base": base, "dtype": "float32", "compile": "wait", "max_batch_size": 32}
    return {**common, "shares_prefixes": False, **more}


# ------------------------------------------------------------------------------------------------------ measuring


def rates(arms: dict[str, Arm], prompts: Prompts, concurrency: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each arm in each round; the arms take turns, and in who is first."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm(prompts[: max(concurrency, 4)], concurrency)
    for round_ in range(rounds):
        for name in list(arms)[:: -1 if round_ % 2 else 1]:
            num_tokens, seconds = arms[name](prompts, concurrency)
            found[name].append(num_tokens / seconds)
    return found


def overhead(base: str, heads: str, prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Tokens/s at concurrency 8 beside the engine alone, and ms that a request and an event add to a small base."""
    found: dict[str, Any] = {}
    args = engine_args(base, heads=heads, max_batch_size=8)
    engine = InProcess(**args, tree="auto", max_total_tokens=MAX_TOTAL_TOKENS)
    with serving({"medusa": {**args}}) as urls:
        arms: dict[str, Arm] = {"engine, in process": engine}
        arms |= {path: Client(url, "medusa") for path, url in urls["medusa"].items()}
        found["tokens_per_s"] = rates(arms, prompts, 8, rounds)
    with tempfile.TemporaryDirectory() as folder:
        small = random_base("0.9 M", folder)
        # No tokenizer comes with it: any will do, as prompts are token ids and the text is not looked at.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_bytes((Path(base) / name).read_bytes())
        args = engine_args(small, max_batch_size=8)
        engine = InProcess(**args, max_total_tokens=MAX_TOTAL_TOKENS)
        with serving({"small": args}) as urls:
            draw = random.Random(0)
            single = [[draw.randrange(6, VOCAB_SIZE) for _ in range(32)] for _ in range(NUM_SINGLE)]
            found["added_ms"] = {
                path: added(engine, Client(url, "small"), single) for path, url in urls["small"].items()
            }
    return found


def added(engine: InProcess, client: Client, prompts: Prompts, num_tokens: int = 32) -> dict[str, float]:
    """Medians of ms beyond the engine's own: of a reply of one token without a stream, of each further event."""
    alone = {
        n: [engine([p], 1, max_new_tokens=n, ignore_eos=True)[1] for p in prompts] for n in (1, num_tokens)
    }
    step_s = (statistics.median(alone[num_tokens]) - statistics.median(alone[1])) / (num_tokens - 1)

    async def ask() -> tuple[list[float], list[float]]:
        reader, writer = await asyncio.open_connection(client.parts.hostname, client.parts.port)
        requests, events = [], []
        for prompt in prompts:
            started = time.perf_counter()
            await client.ask(
                reader, writer, prompt, max_tokens=1, ignore_eos=True, stream=False, stream_options=None
            )
            requests.append(time.perf_counter() - started)
            _, arrived = await client.ask(reader, writer, prompt, max_tokens=num_tokens, ignore_eos=True)
            events.append((arrived[-1] - arrived[0]) / (num_tokens - 1))
        return requests, events

    requests, events = asyncio.run(ask())
    return {
        "request_ms": 1e3 * (statistics.median(requests) - statistics.median(alone[1])),
        "event_ms": 1e3 * (statistics.median(events) - step_s),
        "engine_request_ms": 1e3 * statistics.median(alone[1]),
        "engine_step_ms": 1e3 * step_s,
    }


def compare(
    base: str, heads: str, prompts: Prompts, rounds: int, venv: Path | None
) -> dict[str, dict[str, list[float]]]:
    """Tokens/s of each arm by concurrency, all of them up from the first measurement to the last."""
    found = {}
    with ExitStack() as stack:
        urls = stack.enter_context(
            serving({"medusa": engine_args(base, heads=heads), "baseline": engine_args(base)})
        )
        arms: dict[str, Arm] = {arm: Client(paths["replica's port"], arm) for arm, paths in urls.items()}
        if venv:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            exchange.export(heads, f"{folder}/heads", "vllm")
            num_heads = provenance.read_json(f"{heads}/config.json")["medusa_num_heads"]
            common = (
                venv,
                base,
                SERVER_CORE,
                MAX_TOTAL_TOKENS,
                "--no-enable-prefix-caching",
                "--max-num-seqs",
                "32",
            )
            medusa = peers.vllm(*common, heads=f"{folder}/heads", num_heads=num_heads)
            arms["vLLM, Medusa"] = Client(stack.enter_context(medusa), "base")
            arms["vLLM, base"] = Client(stack.enter_context(peers.vllm(*common)), "base")
        for concurrency in (1, 8, 32):
            num_prompts = min(len(prompts), 32 if concurrency == 1 else 128)
            found[str(concurrency)] = rates(arms, prompts[:num_prompts], concurrency, rounds)
            show(f"concurrency {concurrency}, {num_prompts} prompts", found[str(concurrency)], "baseline")
    return found


def show(title: str, rates: dict[str, list[float]], reference: str) -> None:
    print(f"\n{title}: tokens/s, median of {len(rates[reference])} rounds")
    for arm, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[reference], strict=True))
        print(f"  {arm:24}{statistics.median(values):9.0f}{ratio:8.2f} of {reference}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["overhead", "arms"])
    parser.add_argument("--run", type=Path, required=True, help="folder of a demo's run")
    parser.add_argument("--vllm", type=Path, help="virtual environment that has vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    prompts = [
        row["prompt_ids"]
        for row in pq.read_table(given.run / "prompts/test").sort_by("id").to_pylist()
        if row["error"] is None
    ]
    heads = str((given.run / "heads").resolve())
    if given.what == "overhead":
        found: dict[str, Any] = overhead(str(BASE), heads, prompts[:128], given.rounds)
        show("concurrency 8", found["tokens_per_s"], "engine, in process")
        for path, figures in found["added_ms"].items():
            print(f"  {path:24}" + "".join(f"{name} {value:.3f}  " for name, value in figures.items()))
    else:
        found = compare(str(BASE), heads, prompts, given.rounds, given.vllm)
    if given.out:
        record = {given.what: found, "hardware": provenance.hardware(), "versions": provenance.versions()}
        given.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
