"""Request rows -> figures of each arm, and of medusa against the baseline.

Figures of an arm at a load are over its good requests; a failure only counts as a failure. Medians are over
requests, except the two rates, which are medians over rounds. What the rows cannot tell is None.

    acceleration       tokens per step: one of the base and the accepted guesses; no wall clock
    requests_per_s     completed requests over the wall window of a round (first send to last byte)
    request_latency_s  send to last byte
    ttft_ms            send to first content
    tpot_ms            (latency - ttft) / (tokens - 1) of one request; a reply of one token has none
    itl_ms             GuideLLM's mean: sum of (latency - ttft) over sum of (tokens - 1) of all requests
    speedup            baseline over medusa, so more is better: of the medians of TPOT over the pairs (round,
                       prompt) that both arms answered, with a 95% interval; and of output tokens per second
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]  # one row of records.REQUESTS
Figure = Callable[[Row], float | None]

MIN_PROMPTS = 5  # fewer give no interval
NUM_RESAMPLES = 1000


class Ratio(NamedTuple):
    """Baseline over medusa; the interval is null where too few prompts were measured."""

    point: float
    low: float | None
    high: float | None


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


# ------------------------------------------------------------------------------------------------ one arm


def concurrency(load: str) -> int | None:
    """Requests in flight at a load; None for throughput, which sends as many as the server takes."""
    if load == "synchronous":
        return 1
    return int(load.removeprefix("concurrency=")) if load.startswith("concurrency=") else None


def in_order(loads: set[str]) -> list[str]:
    """synchronous first, then rising concurrency, throughput last."""
    return sorted(loads, key=lambda load: (load != "synchronous", concurrency(load) or 10**9, load))


def measure_arm(rows: list[Row]) -> dict[str, Any]:
    """One arm's entry: acceptance over all loads together, the other figures load by load."""
    good = [row for row in rows if row["error"] is None]
    histogram = add_histograms(row["accepted_histogram"] for row in good if row["accepted_histogram"])
    num_steps = sum(histogram)
    tokens_per_step = None
    if num_steps:
        tokens_per_step = acceleration(sum(j * count for j, count in enumerate(histogram)), num_steps)
    elif told := [row for row in good if row["num_steps"]]:
        # A server that tells its steps only. The first token is the prefill's.
        num_decoded = sum(row["output_tokens"] - 1 for row in told)
        tokens_per_step = num_decoded / sum(row["num_steps"] for row in told)
    loads = in_order({row["load"] for row in rows})
    return {
        "acceleration": tokens_per_step,
        "accepted_per_position": [sum(histogram[j:]) / num_steps for j in range(1, len(histogram))],
        "acceptance_histogram": histogram,
        "load": {load: measure_load([row for row in rows if row["load"] == load]) for load in loads},
    }


def add_histograms(histograms: Iterable[list[int]]) -> list[int]:
    """Element-wise sum; a shorter histogram has zeros at the end."""
    total: list[int] = []
    for histogram in histograms:
        total += [0] * (len(histogram) - len(total))
        for j, count in enumerate(histogram):
            total[j] += count
    return total


def measure_load(rows: list[Row]) -> dict[str, Any]:
    """The figures of one arm at one load, over all its rounds."""
    good = [row for row in rows if row["error"] is None]
    latency_s = [row["latency_s"] for row in good]
    ttft, tpot = (
        [value for row in good if (value := figure(row)) is not None] for figure in (ttft_ms, tpot_ms)
    )
    streamed = [row for row in good if tpot_ms(row) is not None]
    streaming_s = sum(row["latency_s"] - row["ttft_s"] for row in streamed)
    num_gaps = sum(row["output_tokens"] - 1 for row in streamed)
    return {
        "requests": len(rows),
        "failed": len(rows) - len(good),
        "requests_per_s": _percentile(_rates(rows, lambda row: 1), 50),
        "request_latency_s": _percentile(latency_s, 50),
        "ttft_ms": _percentile(ttft, 50),
        "tpot_ms": _percentile(tpot, 50),
        "itl_ms": 1e3 * streaming_s / num_gaps if num_gaps else None,
        "output_tokens_per_s": _percentile(_rates(rows, lambda row: row["output_tokens"]), 50),
        "p99": {
            "request_latency_s": _percentile(latency_s, 99),
            "ttft_ms": _percentile(ttft, 99),
            "tpot_ms": _percentile(tpot, 99),
        },
    }


def ttft_ms(row: Row) -> float | None:
    """Send to first content; None where a server did not stream."""
    return None if row["ttft_s"] is None else 1e3 * row["ttft_s"]


def tpot_ms(row: Row) -> float | None:
    """Time per output token after the first; None for a reply of one token."""
    if row["ttft_s"] is None or (row["output_tokens"] or 0) < 2:
        return None
    return 1e3 * (row["latency_s"] - row["ttft_s"]) / (row["output_tokens"] - 1)


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


# ------------------------------------------------------------------------------------------------ two arms


def measure_speedup(rows: list[Row], arms: dict[str, Any]) -> dict[str, Any]:
    """Medusa over baseline at each load that both arms served; empty unless both were measured."""
    baseline, medusa = (arms[arm]["load"] if arm in arms else {} for arm in ("baseline", "medusa"))
    speedup = {}
    for load in in_order(baseline.keys() & medusa.keys()):
        before, after = baseline[load]["output_tokens_per_s"], medusa[load]["output_tokens_per_s"]
        tpot = paired_ratio(rows, load, tpot_ms)
        speedup[load] = {
            "output_tokens_per_s": after / before if before and after else None,
            "tpot": tpot.point if tpot else None,
            "ci95": [tpot.low, tpot.high] if tpot and tpot.low is not None else None,
        }
    return speedup


def paired_ratio(
    rows: list[Row], load: str, figure: Figure, percent: float = 50, seed: int = 0
) -> Ratio | None:
    """Baseline over medusa of one percentile of `figure`, over the (round, prompt) pairs that both answered.

    The interval is a bootstrap over prompts: all rounds of a prompt are drawn together, since they resemble
    each other more than other prompts do. A prompt sent twice in a round counts once, with its mean. None
    where no pair has the figure.
    """
    values: dict[str, dict[tuple[int, int], list[float]]] = {
        arm: defaultdict(list) for arm in ("baseline", "medusa")
    }
    for row in rows:
        if row["load"] == load and row["arm"] in values and row["error"] is None:
            value = figure(row)
            if value is not None:
                values[row["arm"]][row["prompt"], row["round"]].append(value)
    pairs = values["baseline"].keys() & values["medusa"].keys()
    if not pairs:
        return None
    prompts, rounds = (
        {number: index for index, number in enumerate(sorted({pair[axis] for pair in pairs}))}
        for axis in (0, 1)
    )
    # Arm, prompt, round; nan where a pair is missing.
    times_APR = np.full((2, len(prompts), len(rounds)), np.nan)
    for prompt, round_ in pairs:
        for arm, found in enumerate(values.values()):
            times_APR[arm, prompts[prompt], rounds[round_]] = np.mean(found[prompt, round_])
    # The one that minds nan is ten times slower.
    percentile = np.nanpercentile if np.isnan(times_APR).any() else np.percentile

    def ratios(draws_SP: np.ndarray) -> np.ndarray:
        """The ratio of each sample of prompts, given as indices."""
        samples_ASN = times_APR[:, draws_SP].reshape(2, len(draws_SP), -1)
        baseline, medusa = percentile(samples_ASN, percent, axis=2)
        return np.asarray(baseline / medusa)

    point = float(ratios(np.arange(len(prompts))[None])[0])
    if len(prompts) < MIN_PROMPTS:
        return Ratio(point, None, None)
    draws_SP = np.random.default_rng(seed).integers(len(prompts), size=(NUM_RESAMPLES, len(prompts)))
    # In parts, so that thousands of prompts fit into memory.
    found_S = np.concatenate([ratios(part) for part in np.array_split(draws_SP, 20)])
    low, high = np.percentile(found_S, [2.5, 97.5])
    return Ratio(point, float(low), float(high))
