"""Two arms -> speedup at equal concurrency and at equal latency, where it ends, and what it should have been.

# S samples, the first of them what was measured
"""

import math
from typing import Any

import numpy as np

from medusa_ray.report.numbers import (
    FIGURES,
    concurrency,
    drawn_rate,
    in_order,
    measure_acceptance,
    tokens,
    tpot_ms,
)
from medusa_ray.report.samples import Drawn, Samples, num_prompts

ARMS = ("baseline", "medusa")


def compared_loads(samples: Samples) -> list[str]:
    """The loads at which both arms were measured, in order."""
    return in_order(samples.loads(*ARMS))


# ------------------------------------------------------------------------------------------------ equal concurrency


def measure_speedup(samples: Samples, arms: dict[str, Any], faults: dict[str, str]) -> dict[str, Any]:
    """Medusa over baseline at each load that both arms served; where they are not comparable, why instead."""
    speedup = {}
    for load in compared_loads(samples):
        before, after = (arms[arm]["load"][load]["output_tokens_per_s"] for arm in ARMS)
        fault = faults.get(load)
        tpot = None if fault else samples.quotient(load, tpot_ms)
        rates = None if fault else drawn_speedup(samples, load)
        speedup[load] = {
            # An open load fixes the rate of both arms.
            "output_tokens_per_s": after / before if before and after and rates else None,
            "output_tokens_per_s_ci95": rates.interval if rates else None,
            "tpot": tpot.point if tpot else None,
            "ci95": tpot.interval if tpot else None,
            "not_comparable": fault,
        }
    return speedup


def drawn_speedup(samples: Samples, load: str) -> Drawn | None:
    """Of output tokens per second; None at an open load, which fixes that rate."""
    before, after = (drawn_rate(samples, arm, load, tokens) for arm in ARMS)
    if before is None or after is None:
        return None
    return Drawn(after.found_S / before.found_S, min(before.num_prompts, after.num_prompts))


def measure_categories(samples: Samples, faults: dict[str, str]) -> dict[str, Any]:
    """Requests, acceleration and speedup by kind of prompt; empty where prompts have no category."""
    rows = {
        load: [row for arm in ARMS for row in samples.rows(arm, load)] for load in compared_loads(samples)
    }
    names = sorted({row["category"] for sent in rows.values() for row in sent if row["category"] is not None})
    found = {}
    for name in names:
        own = {load: [row for row in sent if row["category"] == name] for load, sent in rows.items()}
        ratios = {
            load: samples.quotient(load, tpot_ms, rows=sent)
            for load, sent in own.items()
            if load not in faults
        }
        medusa = [row for sent in own.values() for row in sent if row["arm"] == "medusa"]
        found[name] = {
            "requests": len(medusa),
            "acceleration": measure_acceptance(medusa)["acceleration"],
            "speedup": {load: {"tpot": r.point, "ci95": r.interval} for load, r in ratios.items() if r},
        }
    return found


# ------------------------------------------------------------------------------------------------ equal latency


def measure_equal_latency(samples: Samples, faults: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """At each latency that the baseline had: the output tokens per second of both arms, medusa's interpolated."""
    loads = [load for load in compared_loads(samples) if concurrency(load) and load not in faults]
    found = {}
    for name in ("tpot_ms", "request_latency_s"):
        curves = {arm: [_point(samples, arm, load, name) for load in loads] for arm in ARMS}
        found[name] = [
            _at_equal(load, point, [other for other in curves["medusa"] if other])
            for load, point in zip(loads, curves["baseline"], strict=True)
            if point
        ]
    return found


def _point(samples: Samples, arm: str, load: str, name: str) -> tuple[Drawn, Drawn] | None:
    """Median latency and output tokens per second."""
    values_PR = samples.grid(samples.rows(arm, load), FIGURES[name])
    made = drawn_rate(samples, arm, load, tokens)
    if made is None or np.isnan(values_PR).all():
        return None
    return Drawn(samples.percentile(values_PR, 50), num_prompts(values_PR)), made


def _at_equal(load: str, baseline: tuple[Drawn, Drawn], medusa: list[tuple[Drawn, Drawn]]) -> dict[str, Any]:
    time, made = baseline
    reached_S = reached(
        np.array([point[0].found_S for point in medusa]),
        np.array([point[1].found_S for point in medusa]),
        time.found_S,
    )
    ratio = Drawn(
        reached_S / made.found_S, min(time.num_prompts, *(point[0].num_prompts for point in medusa))
    )
    is_met = not math.isnan(ratio.point)
    return {
        "load": load,
        "at": time.point,
        "baseline": made.point,
        "medusa": float(reached_S[0]) if is_met else None,
        "ratio": ratio.point if is_met else None,
        "ci95": ratio.interval if is_met else None,
    }


def reached(times_LS: np.ndarray, rates_LS: np.ndarray, at_S: np.ndarray) -> np.ndarray:
    """The highest rate [S] on the lines between neighbouring loads at that time; nan where no line comes by it.

    >>> reached(np.array([[2.0], [4.0]]), np.array([[100.0], [300.0]]), np.array([3.5])).tolist()
    [250.0]
    """
    best_S = np.full(len(at_S), np.nan)
    for load in range(len(times_LS) - 1):
        (start_S, end_S), (low_S, high_S) = times_LS[load : load + 2], rates_LS[load : load + 2]
        is_between_S = (np.minimum(start_S, end_S) <= at_S) & (at_S <= np.maximum(start_S, end_S))
        span_S = np.where(end_S == start_S, 1, end_S - start_S)
        rate_S = low_S + (at_S - start_S) / span_S * (high_S - low_S)
        best_S = np.fmax(best_S, np.where(is_between_S, rate_S, np.nan))
    return best_S


# ------------------------------------------------------------------------------------------------ break-even


def measure_break_even(samples: Samples, faults: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Up to which concurrency medusa is the faster, by time per output token and by output tokens per second."""
    loads = [load for load in compared_loads(samples) if concurrency(load) and load not in faults]
    drawn = {
        "tpot": {load: samples.quotient(load, tpot_ms) for load in loads},
        "output_tokens_per_s": {load: drawn_speedup(samples, load) for load in loads},
    }
    found = {}
    for name, by_load in drawn.items():
        ratios: dict[int, list[Drawn]] = {}
        for load, ratio in by_load.items():
            if ratio:
                ratios.setdefault(concurrency(load) or 1, []).append(ratio)
        if ratios:
            found[name] = _break_even(ratios)
    return found


def _break_even(ratios: dict[int, list[Drawn]]) -> dict[str, Any]:
    numbers = sorted(ratios)
    # synchronous and concurrency=1 are one concurrency, measured twice.
    ratios_CS = np.array([np.mean([ratio.found_S for ratio in ratios[number]], axis=0) for number in numbers])
    end = Drawn(crossing(numbers, ratios_CS), min(r.num_prompts for found in ratios.values() for r in found))
    bounds = end.interval
    point, ends = _in_words(end.point, numbers), [_in_words(bound, numbers) for bound in bounds or []]
    return {
        "concurrency": end.point if 0 < end.point < math.inf else None,
        "ci95": [bound if 0 < bound < math.inf else None for bound in bounds] if bounds else None,
        "text": point if set(ends) <= {point} else "{} (95% interval {} to {})".format(point, *ends),
    }


def _in_words(number: float, measured: list[int]) -> str:
    if number == math.inf:
        return f"> {measured[-1]}"
    return f"{number:.1f}" if number > 0 else f"< {measured[0]}"


def crossing(numbers: list[int], ratios_CS: np.ndarray) -> np.ndarray:
    """Where the ratio first falls below 1 [S], on a line over the logarithm of the concurrency between neighbours.

    0 where it is below 1 from the start, infinite where it stays above.

    >>> crossing([1, 4, 16], np.array([[1.4], [1.2], [0.8]])).tolist()
    [8.0]
    """
    found_S = np.where(ratios_CS[0] < 1, 0, math.inf)
    for place in reversed(range(len(numbers) - 1)):
        above_S, below_S = ratios_CS[place : place + 2]
        falls_S = (above_S >= 1) & (below_S < 1)
        share_S = (above_S - 1) / np.where(falls_S, above_S - below_S, 1)
        where_S = numbers[place] * (numbers[place + 1] / numbers[place]) ** share_S
        found_S = np.where(falls_S & (ratios_CS[0] >= 1), where_S, found_S)
    return found_S
