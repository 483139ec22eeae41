"""Acceleration and measured step times -> the speedup that they allow, to stand beside the one that was measured.

What lies between the two is what a step spends beside the model: drafting, sampling, Python, HTTP, and waiting.
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from medusa_ray.report.numbers import concurrency

Times = dict[float, dict[float, float]]  # rows -> nodes -> seconds of a step


def predict(
    evaluation: dict[str, Any], info: dict[str, Any] | None, report: dict[str, Any]
) -> dict[str, Any]:
    """The report's `predicted`: in process by batch size, and served where the server knows its step times."""
    by_batch = (evaluation.get("engine") or {}).get("by_batch") or {}
    keys = ("acceleration", "step_cost_ratio", "predicted", "measured")
    engine = {size: _beside(**{key: found.get(key) for key in keys}) for size, found in by_batch.items()}
    times = step_times(info)
    medusa = report["arms"].get("medusa", {"load": {}})["load"]
    served = {}
    for load, speedup in report["speedup"].items():
        found, rows = medusa[load], concurrency(load)
        if times and rows and found["acceleration"] and found["nodes_per_step"]:
            ratio = step_cost_ratio(times, rows, found["nodes_per_step"])
            predicted = found["acceleration"] / ratio if ratio else None
            served[load] = _beside(found["acceleration"], ratio, predicted, speedup["tpot"])
    return {"engine": engine, "served": served}


def _beside(
    acceleration: float | None, step_cost_ratio: float | None, predicted: float | None, measured: float | None
) -> dict[str, float | None]:
    return {
        "acceleration": acceleration,
        "step_cost_ratio": step_cost_ratio,
        "predicted": predicted,
        "measured": measured,
        "gap": measured / predicted - 1 if measured and predicted else None,
    }


def step_times(info: dict[str, Any] | None) -> Times:
    """What a server's /info says of its steps; empty where it has not measured them."""
    told = (info or {}).get("step_times") or {}
    return {float(rows): {float(nodes): s for nodes, s in of.items()} for rows, of in told.items()}


def step_cost_ratio(times: Times, rows: float, nodes: float) -> float | None:
    """The time of a step with so many nodes, the root counted, over that of one with the root alone.

    On the line between sizes that were measured; None beyond them.

    >>> step_cost_ratio({1: {1: 0.010, 9: 0.014}, 4: {1: 0.020, 9: 0.030}}, rows=1, nodes=5)
    1.2
    """
    with_tree, alone = (step_seconds(times, rows, size) for size in (nodes, 1))
    return with_tree / alone if with_tree and alone else None


def step_seconds(times: Times, rows: float, nodes: float) -> float | None:
    """Of one step, on the lines between measured sizes; None beyond them."""
    return between({of: between(by_nodes, nodes) for of, by_nodes in times.items()}, rows)


def between(values: Mapping[float, float | None], at: float) -> float | None:
    """The value on the line between the two neighbours; None outside of what there is."""
    known = sorted((place, value) for place, value in values.items() if value is not None)
    right = bisect_left(known, at, key=lambda point: point[0])
    if right == len(known) or (right == 0 and known[0][0] != at):
        return None
    (high, above), (low, below) = known[right], known[max(right - 1, 0)]
    return above if high == low else below + (at - low) / (high - low) * (above - below)
