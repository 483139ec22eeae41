"""What distilling costs beside the engine: Ray, files and the driver at many rows, and one and two actors at real ones.

    python tests/distill_speed.py rows --num-rows 10000 100000 1000000    # a generator that answers at once
    python tests/distill_speed.py rows --num-rows 32000 --rows-per-part 4  # what a file costs the driver
    python tests/distill_speed.py actors --num-rows 512                   # the demo's base: bare engine, one actor, two

`rows`: each size in a driver process of its own, whose peak memory is the driver's. `actors`: the same prompts through
the bare engine in one thread, and through the stage with one and two actors, in turns. Start of Ray and loading of
the actors are reported apart: the steady rate is that between the first part and the last.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from medusa_ray import distill, parts, provenance, records, shards
from medusa_ray.config import RunConfig
from medusa_ray.demo import chats
from medusa_ray.distill.rows import seed_of
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Counters
from medusa_ray.medusa.scheduler import Sequence

SHIPPED = Path(__file__).parents[1] / "medusa_ray/demo/base"
ROWS_PER_FILE = 4096  # of prompts


class Instant:
    """An engine that answers every prompt with its own tokens."""

    num_waiting = 0

    def __init__(self) -> None:
        self.counters = Counters()
        self.waiting: list[Sequence] = []

    def check(self, request: Request) -> None:
        pass

    def add(self, request: Request) -> Sequence:
        sequence = Sequence(request, frozenset())
        self.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        while self.waiting:
            sequence = self.waiting.pop()
            sequence.token_ids, sequence.finish_reason = sequence.request.prompt_ids, "stop"


def instant(base: str, **options: Any) -> Instant:
    return Instant()


def write_prompts(folder: Path, prompts: Iterable[list[int]]) -> None:
    """File by file, so that this process never holds them all."""
    left, longest = iter(prompts), 0
    for index in itertools.count():
        some = list(itertools.islice(left, ROWS_PER_FILE))
        if not some:
            break
        longest = max(longest, *map(len, some))
        start = index * ROWS_PER_FILE
        rows = [{"id": f"chat{start + i:07}/0", "prompt_ids": ids} for i, ids in enumerate(some)]
        table = pa.Table.from_pylist(rows, records.PROMPTS)
        parts.write(f"{folder}/prompts/train", parts.part_name(index), table)
    provenance.write(f"{folder}/prompts", {}, {}, splits={"train": {"longest_prompt_tokens": longest}})


def config_of(folder: Path, **options: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": str(folder),
            "model": {"base": str(SHIPPED), "dtype": "float32", "device": "cpu"},
            "data": {"train": "-"},
            "distill": options,
            "hidden": {"mode": "compute"},
        }
    )


def measured(config: RunConfig, load_engine: Any = None) -> dict[str, Any]:
    """The stage, with the moment of each part."""
    times: list[tuple[float, int, int]] = []
    run = shards.run

    def timed(*arguments: Any, **options: Any) -> Any:
        for facts in run(*arguments, **options):
            times.append((time.perf_counter(), facts["rows"]["in"], facts["num_reply_tokens"]))
            yield facts

    started_s = time.perf_counter()
    shards.run = timed  # type: ignore[assignment]
    try:
        distill.run(config, load_engine)
    finally:
        shards.run = run
    (first_s, first_rows, first_tokens), (last_s, *_) = times[0], times[-1]
    rows, tokens = sum(time[1] for time in times), sum(time[2] for time in times)
    steady_s = last_s - first_s
    # While all actors work: the first have loaded before the last, and end before it.
    middle = slice(2 * len(times) // 5, 9 * len(times) // 10)
    done = np.cumsum([time[1] for time in times])
    record = provenance.read(config.artifact("distilled"))
    assert record is not None
    return {
        "parts": len(times),
        "rows": rows,
        "seconds": time.perf_counter() - started_s,
        "first_part_s": first_s - started_s,
        "rows_per_s": (rows - first_rows) / steady_s,
        "middle_rows_per_s": np.polyfit([time[0] for time in times[middle]], done[middle], 1)[0],
        "tokens_per_s": (tokens - first_tokens) / steady_s,
        "tokens_per_actor_s": record["num_reply_tokens"] / record["actor_seconds"],  # loaded to last part
        "occupancy": record["occupancy"],
    }


def start_ray(num_cpus: int) -> float:
    started_s = time.perf_counter()
    ray.init(
        address="local",  # whatever other cluster this machine has
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    return time.perf_counter() - started_s


def many_rows(num_rows: int, rows_per_part: int | None) -> dict[str, Any]:
    """One size, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder), ([1 + i % 200, 2, 3, 4, 5, 6, 7, 8] for i in range(num_rows)))
        before_mib = peak_mib()
        ray_s = start_ray(2)
        before_s = time.process_time()
        result = measured(config_of(Path(folder), num_actors=2, rows_per_part=rows_per_part), instant)
        result |= {"ray_s": ray_s, "driver_cpu_s": time.process_time() - before_s}
        return {**result, "peak_before_mib": before_mib, "driver_peak_mib": peak_mib()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def real_prompts(num_rows: int) -> list[list[int]]:
    from medusa_ray.chat import Chat

    chat = Chat.load(str(SHIPPED))
    return [chat.prompt_ids(row["messages"][:-1]) for row in chats.chats("train", num_rows)]


def bare(prompts: list[list[int]], config: RunConfig) -> dict[str, Any]:
    """The engine alone, loading apart; the rate is over all, first and last steps too."""
    settings = config.distill
    torch.set_num_threads(1)
    engine = Engine.load(
        str(SHIPPED),
        max_batch_size=settings.batch_size,
        max_total_tokens=max(map(len, prompts)) + settings.max_new_tokens,
    )
    started_s = time.perf_counter()
    replies = engine.generate(
        prompts,
        settings.max_new_tokens,
        temperature=settings.temperature,
        seed=[seed_of(settings.seed, f"chat{i:07}/0") for i in range(len(prompts))],
    )
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    seconds = time.perf_counter() - started_s
    return {"seconds": seconds, "tokens": num_tokens, "tokens_per_s": num_tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["rows", "actors"])
    parser.add_argument("--num-rows", type=int, nargs="+", required=True)
    parser.add_argument("--rows-per-part", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.what == "rows" and len(arguments.num_rows) > 1:
        for num_rows in arguments.num_rows:  # peak memory is a process's own
            subprocess.run([sys.executable, __file__, "rows", "--num-rows", str(num_rows)], check=True)
    elif arguments.what == "rows":
        print(json.dumps(many_rows(arguments.num_rows[0], arguments.rows_per_part)), flush=True)
    else:
        prompts = real_prompts(arguments.num_rows[0])
        print(json.dumps({"ray_s": start_ray(2)}), flush=True)
        for _ in range(arguments.rounds):
            for num_actors in (0, 1, 2):
                with tempfile.TemporaryDirectory() as folder:
                    options = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
                    config = config_of(Path(folder), num_actors=num_actors or 1, **options)
                    write_prompts(Path(folder), prompts)
                    result = measured(config) if num_actors else bare(prompts, config)
                    print(json.dumps({"actors": num_actors, **result}), flush=True)


if __name__ == "__main__":
    main()
