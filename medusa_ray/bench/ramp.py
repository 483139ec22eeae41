"""Concurrency that changes over time -> how replicas and latency follow. One target, no comparison.

GuideLLM keeps a concurrency for a whole run and takes seconds between two, in which replicas would be let go; so this
sends its own requests, from as many threads as the largest step has.
"""

import itertools
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medusa_ray.bench import targets
from medusa_ray.bench.prompts import Prompt
from medusa_ray.config import TrafficConfig

POLL_S = 0.05
SAMPLE_S = 1.0


@dataclass
class Record:
    """What was seen; seconds since the ramp began."""

    replicas: list[tuple[float, int, int]] = field(default_factory=list)  # second, running, wanted
    latency_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # by the second of the end
    num_failed: int = 0


def run(config: TrafficConfig, prompts: list[Prompt]) -> dict[str, Any] | None:
    """The ramp of the config, as bench.json has it; None where the config has none."""
    ramp = config.ramp
    if ramp is None:
        return None
    target = config.targets[ramp.target]
    record, lock, turn = Record(), threading.Lock(), itertools.count()
    starts_s = [0.0, *itertools.accumulate(seconds for seconds, _ in ramp.steps)]
    began_s = time.monotonic()

    def allowed() -> int:
        """Requests that may be in flight now; 0 after the last step."""
        now_s = time.monotonic() - began_s
        return next(
            (n for end_s, (_, n) in zip(starts_s[1:], ramp.steps, strict=True) if now_s < end_s), 0
        )

    def user(number: int) -> None:
        while most := allowed():
            if number >= most:
                time.sleep(POLL_S)
                continue
            sent_s = time.monotonic()
            try:
                targets.ask(target, prompts[next(turn) % len(prompts)], config)
            except OSError:
                with lock:
                    record.num_failed += 1
                time.sleep(POLL_S)  # a server that refuses at once would be asked as fast as it refuses
                continue
            ended_s = time.monotonic()
            with lock:
                record.latency_s[int(ended_s - began_s)].append(ended_s - sent_s)

    num_users = max(concurrency for _, concurrency in ramp.steps)
    with ThreadPoolExecutor(num_users) as pool:
        users = [pool.submit(user, number) for number in range(num_users)]
        while allowed():
            if found := targets.replicas(target):
                record.replicas.append((time.monotonic() - began_s, *found[:2]))
            time.sleep(SAMPLE_S)
        for each in users:
            each.result()
    return {
        "arm": ramp.target,
        "steps": [[start_s, concurrency] for start_s, (_, concurrency) in zip(starts_s, ramp.steps, strict=False)],
        "replicas": [list(sample) for sample in record.replicas],
        "latency": [
            [second, *np.percentile(values, [50, 99]).tolist()] for second, values in sorted(record.latency_s.items())
        ],
        "failed": record.num_failed,
    }
