"""What a server measured of its steps -> pictures. Each is None when it told nothing of them."""

from typing import Any

from matplotlib.axes import Axes

from medusa_ray.report.drawing import (
    BASELINE,
    CONTRAST,
    INK,
    MEDUSA,
    PALE,
    Picture,
    apart,
    at_right,
    drawing,
    legend,
    load_axis,
    mixed,
)
from medusa_ray.report.numbers import concurrency
from medusa_ray.report.predicted import Times, step_seconds, step_times


def step_cost(report: dict[str, Any], info: dict[str, Any] | None) -> Picture | None:
    """What a step with a tree costs, over one without, by the tree's nodes and the rows of the batch."""
    times = step_times(info)
    shown = [
        (rows, nodes, seconds, seconds / of[1.0])
        for rows, of in sorted(times.items())
        if of.get(1.0)
        for nodes, seconds in sorted(of.items())
    ]
    if not shown:
        return None
    columns = dict(
        zip(("rows", "nodes", "seconds", "cost_ratio"), map(list, zip(*shown, strict=True)), strict=True)
    )
    label = "Cost of a step by nodes of the tree, over a step without one"
    with drawing("step_cost", "What a step costs", label, columns) as picture:
        ax, kinds = picture.axes, list(dict.fromkeys(columns["rows"]))
        ends = []
        for index, rows in enumerate(kinds):
            line = [(nodes, ratio) for of, nodes, _, ratio in shown if of == rows]
            colour = mixed(PALE, INK, index / max(len(kinds) - 1, 1))
            ax.plot(*zip(*line, strict=True), "o-", color=colour, markersize=4)
            ends.append((line[-1][1], f"{rows:g} at a time", colour))
        _ends(ax, ends)
        _chosen(ax, report, times)
        ax.set_ylim(0, 1.1 * max(columns["cost_ratio"]))
        ax.margins(x=0.02)
        ax.set_xlabel("nodes, the root counted (rings: the mean that was served)")
        ax.set_ylabel("times a step without a tree")
    return picture


def _ends(ax: Axes, ends: list[tuple[float, str, Any]]) -> None:
    """Names of lines at their right ends, so far apart that they can be read."""
    heights = apart([y for y, _, _ in ends], 0.075 * 1.1 * max(y for y, _, _ in ends))
    for y, (_, text, colour) in zip(heights, ends, strict=True):
        at_right(ax, text, y, colour)


def _chosen(ax: Axes, report: dict[str, Any], times: Times) -> None:
    """The mean tree of each load, on the line of its concurrency."""
    for load, found in report["arms"].get("medusa", {"load": {}})["load"].items():
        rows, nodes = concurrency(load), found["nodes_per_step"]
        if not rows or not nodes:
            continue
        alone, whole = (step_seconds(times, rows, size) for size in (1, nodes))
        if alone and whole:
            ax.plot(nodes, whole / alone, "o", markersize=9, fillstyle="none", color=CONTRAST)


def step_time(report: dict[str, Any], info: dict[str, Any] | None) -> Picture | None:
    """Where the time of a served step goes: the base alone, what the tree adds, and all beside the model."""
    times, shown = step_times(info), []
    for load, found in report["arms"].get("medusa", {"load": {}})["load"].items():
        rows, nodes = concurrency(load), found["nodes_per_step"]
        if not times or not rows or not nodes or not found["tpot_ms"] or not found["acceleration"]:
            continue
        alone, whole = (step_seconds(times, rows, size) for size in (1, nodes))
        if alone and whole:
            step_ms = found["tpot_ms"] * found["acceleration"]
            shown.append((load, 1e3 * alone, 1e3 * (whole - alone), step_ms - 1e3 * whole))
    if not shown:
        return None
    names = ("load", "base_ms", "tree_ms", "beside_ms")
    columns = dict(zip(names, map(list, zip(*shown, strict=True)), strict=True))
    label = "Milliseconds of a served step: the base alone, what the tree adds, all else"
    with drawing("step_time", "Where the time of a step goes", label, columns) as picture:
        ax, below = picture.axes, [0.0] * len(shown)
        parts = (("base_ms", "the base alone", BASELINE), ("tree_ms", "heads and tree", MEDUSA))
        for key, name, colour in (*parts, ("beside_ms", "beside the model", CONTRAST)):
            heights = [max(value, 0) for value in columns[key]]
            ax.bar(range(len(shown)), heights, 0.55, bottom=below, color=colour, label=name)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        ax.set_ylim(0, 1.08 * max(below))
        load_axis(ax, columns["load"])
        ax.set_ylabel("ms per step")
        legend(ax, 3)
    return picture
