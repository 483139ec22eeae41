"""Request rows -> the figures of each arm at each load. What each means: `definitions`.

Figures are over good requests; a failure only counts as a failure. What the rows cannot tell is None.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from medusa_ray.report.samples import Drawn, Figure, Row, Samples, num_prompts

PERCENTILES = (50, 95, 99)
Z95 = 1.959964  # standard deviations to either side of 95% of a normal distribution


def acceleration(num_accepted: int, num_steps: int) -> float:
    """Tokens per step: each step commits one token of the base and the guesses that it accepted.

    The blog post that this project grew from counted 17,687 accepted ("skipped") tokens in 27,101 steps. Its
    wall clock, however, went from 15.56 to 18.53 tokens/s for one request at a time, and from 79.66 to 84.42
    under full load.

    >>> round(acceleration(17_687, 27_101), 2)
    1.65
    >>> round(18.53 / 15.56, 2), round(84.42 / 79.66, 2)
    (1.19, 1.06)
    """
    return (num_steps + num_accepted) / num_steps


def wilson(num_good: int, num_all: int) -> list[float]:
    """The 95% score interval of a share (Wilson, 1927), which stays within 0 and 1 and minds few trials.

    >>> [round(end, 3) for end in wilson(19, 20)]
    [0.764, 0.991]
    """
    share, doubt = num_good / num_all, Z95**2 / num_all
    middle, half = share + doubt / 2, Z95 * math.sqrt(share * (1 - share) / num_all + doubt / (4 * num_all))
    return [max(0.0, (middle - half) / (1 + doubt)), min(1.0, (middle + half) / (1 + doubt))]


# ------------------------------------------------------------------------------------------------ loads


def concurrency(load: str) -> int | None:
    """Requests in flight at a load; None where that is not fixed."""
    if load == "synchronous":
        return 1
    return int(load.removeprefix("concurrency=")) if load.startswith("concurrency=") else None


def rate(load: str) -> float | None:
    """Requests per second that an open load sends, whatever comes back; None for the others."""
    kind, _, number = load.partition("=")
    return float(number) if kind in ("constant", "poisson") else None


def in_order(loads: Iterable[str]) -> list[str]:
    """synchronous first, then rising concurrency, throughput, and then the open ones by kind and rising rate."""

    def place(load: str) -> tuple[Any, ...]:
        if rate(load) is not None:
            return (1, load.partition("=")[0], rate(load))
        return (0, "", load != "synchronous", concurrency(load) or math.inf)

    return sorted(loads, key=place)


# ------------------------------------------------------------------------------------------------ one request


def latency_s(row: Row) -> float | None:
    """From when the request was due, which is when it was sent unless the load is open, to the last byte."""
    return None if row["latency_s"] is None else float(row["latency_s"] + (row["wait_s"] or 0))


def ttft_ms(row: Row) -> float | None:
    """From when the request was due to its first content; None where a server did not stream."""
    return None if row["ttft_s"] is None else 1e3 * (row["ttft_s"] + (row["wait_s"] or 0))


def streaming_s(row: Row) -> float | None:
    """From the first content to the last; None for a reply of one token, which has no such time."""
    if row["ttft_s"] is None or (row["output_tokens"] or 0) < 2:
        return None
    last_s = row["latency_s"] if row["last_s"] is None else row["last_s"]
    return float(last_s - row["ttft_s"])


def tpot_ms(row: Row) -> float | None:
    """Time per output token after the first; None for a reply of one token."""
    whole_s = streaming_s(row)
    return None if whole_s is None else 1e3 * whole_s / (row["output_tokens"] - 1)


def gap_ms(row: Row) -> float | None:
    """Mean time between two stream events with content; None for a reply of one event."""
    whole_s = streaming_s(row)
    return None if whole_s is None or (row["events"] or 0) < 2 else 1e3 * whole_s / (row["events"] - 1)


def user_tokens_per_s(row: Row) -> float | None:
    """What one user sees: tokens of the reply over its latency."""
    whole_s = latency_s(row)
    return row["output_tokens"] / whole_s if row["output_tokens"] and whole_s else None


def wait_s(row: Row) -> float | None:
    """From when the request was due to when it was sent; None unless the load is open."""
    return None if row["wait_s"] is None else float(row["wait_s"])


def one(row: Row) -> float:
    """What a request counts for in requests per second."""
    return 1.0


def tokens(row: Row) -> float:
    return float(row["output_tokens"] or 0)


FIGURES: dict[str, Figure] = {
    "request_latency_s": latency_s,
    "ttft_ms": ttft_ms,
    "tpot_ms": tpot_ms,
    "gap_ms": gap_ms,
    "user_tokens_per_s": user_tokens_per_s,
    "wait_s": wait_s,
}


# ------------------------------------------------------------------------------------------------ acceptance


def measure_acceptance(rows: list[Row]) -> dict[str, Any]:
    """Tokens per step as the server and as the client see it, and which guesses were accepted."""
    good = [row for row in rows if row["error"] is None]
    histogram = add_histograms(row["accepted_histogram"] for row in good if row["accepted_histogram"])
    num_steps = sum(histogram)
    reached = [sum(histogram[j:]) for j in range(len(histogram))]  # [0] are all steps
    tokens_per_step = None
    if num_steps:
        tokens_per_step = acceleration(sum(reached[1:]), num_steps)
    elif told := [row for row in good if row["num_steps"]]:
        # A server that tells its steps only. The first token is the prefill's.
        num_decoded = sum(row["output_tokens"] - 1 for row in told)
        tokens_per_step = num_decoded / sum(row["num_steps"] for row in told)
    streamed = [row for row in good if (row["events"] or 0) > 1]
    drafted = [row for row in good if row["draft_tokens"] is not None and row["num_steps"]]
    num_drafted = sum(row["draft_tokens"] for row in drafted)
    return {
        "acceleration": tokens_per_step,
        "acceleration_at_client": sum(row["output_tokens"] - 1 for row in streamed)
        / sum(row["events"] - 1 for row in streamed)
        if streamed
        else None,
        "accepted_per_position": [count / num_steps for count in reached[1:]],
        "accepted_per_position_conditional": [
            after / before if before else None for before, after in itertools.pairwise(reached)
        ],
        "acceptance_histogram": histogram,
        "draft_acceptance_rate": sum(reached[1:]) / num_drafted if num_drafted else None,
        "nodes_per_step": 1 + num_drafted / sum(row["num_steps"] for row in drafted) if drafted else None,
    }


def add_histograms(histograms: Iterable[list[int]]) -> list[int]:
    """Element-wise sum; a shorter histogram has zeros at the end."""
    total: list[int] = []
    for histogram in histograms:
        total += [0] * (len(histogram) - len(total))
        for j, count in enumerate(histogram):
            total[j] += count
    return total


# ------------------------------------------------------------------------------------------------ one arm


def measure_arm(samples: Samples, arm: str, slo: dict[str, Any]) -> dict[str, Any]:
    """One arm's entry: acceptance over all loads together, the other figures load by load."""
    loads = in_order(samples.loads(arm))
    sent = [row for load in loads for row in samples.rows(arm, load)]
    return measure_acceptance(sent) | {
        "load": {load: measure_load(samples, arm, load, slo) for load in loads}
    }


def measure_load(samples: Samples, arm: str, load: str, slo: dict[str, Any]) -> dict[str, Any]:
    """The figures of one arm at one load, over all its rounds."""
    rows = samples.rows(arm, load)
    good = [row for row in rows if row["error"] is None]
    values = {
        name: [value for row in good if (value := figure(row)) is not None]
        for name, figure in FIGURES.items()
    }
    streamed = [row for row in good if streaming_s(row) is not None]
    num_gaps = sum(row["output_tokens"] - 1 for row in streamed)
    accepted = measure_acceptance(rows)
    at = {
        f"p{percent}": {name: _percentile(values[name], percent) for name in FIGURES}
        for percent in PERCENTILES
    }
    return {
        "requests": len(rows),
        "failed": len(rows) - len(good),
        "requests_per_s": _percentile(_rates(rows, one), 50),
        "request_latency_s": at["p50"]["request_latency_s"],
        "ttft_ms": at["p50"]["ttft_ms"],
        "tpot_ms": at["p50"]["tpot_ms"],
        "itl_ms": 1e3 * sum(streaming_s(row) or 0 for row in streamed) / num_gaps if num_gaps else None,
        "output_tokens_per_s": _percentile(_rates(rows, tokens), 50),
        **{name: accepted[name] for name in ("acceleration", "acceleration_at_client", "nodes_per_step")},
        **at,
        "ci95": _intervals(samples, arm, load),
        "goodput": measure_goodput(rows, slo),
    }


def _intervals(samples: Samples, arm: str, load: str) -> dict[str, list[float] | None]:
    """Of the medians, and of the rates of closed loads: an open one's rate is what it was told to send."""
    found: dict[str, list[float] | None] = {}
    for name in ("request_latency_s", "ttft_ms", "tpot_ms", "gap_ms"):
        values_PR = samples.grid(samples.rows(arm, load), FIGURES[name])
        if not np.isnan(values_PR).all():
            found[name] = Drawn(samples.percentile(values_PR, 50), num_prompts(values_PR)).interval
    for name, amount in (("requests_per_s", one), ("output_tokens_per_s", tokens)):
        drawn = drawn_rate(samples, arm, load, amount)
        found[name] = drawn.interval if drawn else None
    return found


def drawn_rate(samples: Samples, arm: str, load: str, amount: Figure) -> Drawn | None:
    """What an arm brings per second at a closed load; None at an open one.

    With so many requests always in flight, a rate is proportional to the amount over the latency (Little's law): that
    quotient tells how much the rate varies with prompts and rounds, the wall clock tells the rate.
    """
    rows = samples.rows(arm, load)
    measured = _percentile(_rates(rows, lambda row: amount(row) or 0), 50)
    if not measured or rate(load) is not None:
        return None
    amount_PR, latency_PR = samples.grid(rows, amount), samples.grid(rows, latency_s)
    total_S = samples.total(latency_PR)
    quotient_S = np.divide(
        samples.total(amount_PR), total_S, out=np.full(len(total_S), np.nan), where=total_S > 0
    )
    return Drawn(measured * quotient_S / quotient_S[0], num_prompts(latency_PR))


def measure_goodput(rows: list[Row], slo: dict[str, Any]) -> dict[str, Any] | None:
    """Requests that met every limit of the SLO; None where there is none.

    A reply that was not streamed is there when its last byte is.
    """
    limits: dict[str, tuple[Figure, float]] = {
        name: (figure, slo[name])
        for name, figure in (
            ("ttft_ms", lambda row: ttft_ms(row) or 1e3 * (latency_s(row) or math.inf)),
            ("tpot_ms", lambda row: tpot_ms(row) or 0.0),
            ("latency_s", latency_s),
        )
        if slo.get(name) is not None
    }
    if not limits or not rows:
        return None

    def met(row: Row) -> bool:
        return row["error"] is None and all((figure(row) or 0) <= limit for figure, limit in limits.values())

    num_met = sum(met(row) for row in rows)
    low, high = wilson(num_met, len(rows))
    asked = slo.get("share", 0.95)
    return {
        "requests_per_s": _percentile(_rates(rows, met), 50),
        "share": num_met / len(rows),
        "ci95": [low, high],
        "attained": True if low >= asked else False if high < asked else None,
    }


def _rates(rows: list[Row], amount: Callable[[Row], float]) -> list[float]:
    """What the good requests of each round brought, per second between its first send and its last byte."""
    rounds = defaultdict(list)
    for row in rows:
        rounds[row["round"]].append(row)
    rates = []
    for sent in rounds.values():
        end_s = max(row["start_s"] + (row["latency_s"] or 0) for row in sent)
        window_s = end_s - min(row["start_s"] for row in sent)
        if window_s > 0:
            rates.append(sum(amount(row) for row in sent if row["error"] is None) / window_s)
    return rates


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
