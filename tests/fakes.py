"""Stand-ins for tests of the protocol: an engine that plays a script, and a client that can hang up."""

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace

import torch

from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.replies import Counters, Delta
from medusa_ray.medusa.scheduler import QueueFull, Request


class ScriptedEngine:
    """Replies to every request with the same steps, whatever the prompt: [[token, ...], ...]."""

    mode, is_adaptive, heads = "eager", False, None
    vocab_size, eos_ids = 262, frozenset({2})
    num_heads, num_nodes, num_running, num_waiting, num_waiting_tokens = 3, 8, 0, 0, 0
    scheduler = SimpleNamespace(num_queried_tokens=0, num_shared_tokens=0)
    cache = SimpleNamespace(usage=0.0)
    last_step_s = math.inf  # always alive
    model = torch.nn.Linear(1, 1)

    def __init__(
        self, steps: list[list[int]], finish_reason: str = "stop", max_total_tokens: int = 512
    ) -> None:
        self.steps, self.finish_reason, self.max_total_tokens = steps, finish_reason, max_total_tokens
        self.failure: Exception | None = None
        self.counters = Counters()
        self.requests: list[Request] = []
        self.num_open, self.num_cancelled, self.max_open = 0, 0, 100
        self.gate = asyncio.Event()  # closed after `steps_before_gate` steps of a request
        self.steps_before_gate = len(steps) + 1

    def check(self, request: Request) -> None:
        request.check(vocab_size=262)

    def check_room(self, num: int = 1) -> None:
        if self.num_open + num > self.max_open:
            raise QueueFull(f"{self.num_open} requests run or wait here")

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        if self.failure:
            raise RuntimeError(f"the engine has failed: {self.failure}")
        histogram: list[int] = []
        is_done = False
        self.num_open += 1
        try:
            for i, step in enumerate(self.steps):
                if i >= self.steps_before_gate:
                    await self.gate.wait()
                await asyncio.sleep(0)
                if i:  # the first step is the prefill, which accepts nothing
                    histogram += [0] * (len(step) - len(histogram))
                    histogram[len(step) - 1] += 1
                is_done = i == len(self.steps) - 1
                logprobs = None
                if (num_top := request.logprobs) is not None:
                    logprobs = [Logprob(t, -0.5, [(t, -0.5), (6, -2.5)][:num_top]) for t in step]
                reason, guesses = self.finish_reason if is_done else None, i * self.num_nodes
                yield Delta(step, reason, i, list(histogram), guesses, logprobs)
        finally:
            self.num_open -= 1
            self.num_cancelled += not is_done
