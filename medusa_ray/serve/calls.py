"""Requests on their way through a server -> lines of the access log, and the totals behind its metrics."""

import json
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medusa_ray.medusa.replies import Delta

LOG = logging.getLogger(
    "medusa_ray.access"
)  # a JSON object a line, of any request but those that look after us

REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
VALIDATION_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
TOKENS = tuple(float(2**i) for i in range(18))


@dataclass
class Call:
    """What is known of one request so far."""

    id: str
    route: str = ""
    came_s: float = field(default_factory=time.monotonic)  # all times on the monotonic clock
    status: int = 0  # of the response, once it has begun
    error: str | None = None  # code of the error that it ended with
    is_for_reply: bool = False  # rather than for facts
    model: str | None = None
    num_prompt_tokens: int = 0
    max_new_tokens: int = 0
    admitted_s: float | None = None
    queue_s: float = 0.0
    first_s: float | None = None  # first token
    last_s: float = 0.0  # and the last one so far
    num_tokens: int = 0
    num_steps: int = 0
    num_open: int = 1  # replies that are not whole, where several are asked for
    finish_reason: str | None = None  # of the last one to be whole
    prompt: Any = None  # these two are kept for the log alone, where it is to have them
    reply: str | None = None

    def finish(self, reason: str) -> None:
        """Takes in the end of one of its replies."""
        self.num_open -= 1
        if not self.num_open:
            self.finish_reason = reason

    def line(self) -> str:
        """Of the access log."""
        now_s = time.monotonic()
        facts: dict[str, Any] = {
            "time": round(time.time(), 3),
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "total_s": round(now_s - self.came_s, 6),
        }
        if self.is_for_reply:
            facts |= {
                "model": self.model and self.model[:100],
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_tokens,
                "steps": self.num_steps,
                "queue_s": round(self.queue_s, 6),
                "ttft_s": None if self.first_s is None else round(self.first_s - self.came_s, 6),
                "finish_reason": self.finish_reason,
            }
        if self.error is not None:
            facts["error"] = self.error
        if self.prompt is not None:
            facts |= {"prompt": self.prompt, "reply": self.reply}
        return json.dumps(facts, separators=(",", ":"))


class Histogram:
    """Counts of values by size. Adding to it costs less than a microsecond, for it is done at every token."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Totals:
    """What all requests for replies have come to since the server began."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.finished: Counter[str] = Counter()  # replies by finish reason
        self.failed: Counter[str] = Counter()  # requests by TGI's words for why
        self.num_iterations = 0  # steps of a reply that committed something, its prefill among them
        self.num_skipped_tokens = 0  # tokens that came with another one in the same step
        self.ttft_s = Histogram(REQUEST_S)
        self.inter_token_s = Histogram(TOKEN_S)
        self.mean_token_s = Histogram(TOKEN_S)
        self.request_s = Histogram(REQUEST_S)
        self.queue_s = Histogram((0.0001, 0.001, *REQUEST_S))
        self.inference_s = Histogram(REQUEST_S)
        self.validation_s = Histogram(VALIDATION_S)
        self.num_prompt_tokens = Histogram(TOKENS)
        self.num_tokens = Histogram(TOKENS)
        self.max_new_tokens = Histogram(TOKENS)

    def step(self, call: Call, delta: Delta, last_s: float | None) -> float:
        """Takes in a step of one of its replies, whose last one was at last_s; returns when this one is."""
        now_s, num_tokens = time.monotonic(), len(delta.token_ids)
        if not num_tokens:
            return now_s
        self.num_iterations += 1
        self.num_skipped_tokens += num_tokens - 1
        if last_s is not None:
            self.inter_token_s.add((now_s - last_s) / num_tokens, num_tokens)
        elif call.first_s is None:
            call.first_s, call.queue_s = now_s, delta.queue_s
        call.last_s = now_s
        return now_s

    def end(self, call: Call) -> None:
        """Takes in a request that has its whole response, or will get no more of it."""
        self.num_requests += 1
        if call.admitted_s is not None:
            self.validation_s.add(call.admitted_s - call.came_s)
            self.num_prompt_tokens.add(call.num_prompt_tokens)
            self.max_new_tokens.add(call.max_new_tokens)
        if call.first_s is not None:
            self.ttft_s.add(call.first_s - call.came_s)
            self.queue_s.add(call.queue_s)
        if reason := why_failed(call):
            self.failed[reason] += 1
            return
        self.request_s.add(time.monotonic() - call.came_s)
        self.num_tokens.add(call.num_tokens)
        if call.first_s is None or call.admitted_s is None:  # past its deadline before its first token
            return
        self.inference_s.add(call.last_s - call.admitted_s - call.queue_s)
        if call.num_tokens > 1:
            self.mean_token_s.add((call.last_s - call.first_s) / (call.num_tokens - 1))


def why_failed(call: Call) -> str | None:
    """TGI's word for it; None for a request that got all that it asked for."""
    if call.status == 200 and call.error is None:
        return None if call.finish_reason else "dropped"
    if call.status == 499 or not call.status:
        return "dropped"
    if call.status == 429:
        return "overloaded"
    if call.status < 500 and call.status not in (200, 424):
        return "validation"
    return "internal" if call.error == "internal_error" else "generation"
