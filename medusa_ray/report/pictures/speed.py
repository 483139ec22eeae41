"""Figures of both arms on the wall clock -> pictures. Each is None when the run lacks what it would show."""

from typing import Any

from matplotlib.axes import Axes

from medusa_ray.report.drawing import (
    BASELINE,
    CONTRAST,
    INK,
    LOSS,
    MEDUSA,
    QUIET,
    RULE,
    Columns,
    Picture,
    arm_colours,
    at_right,
    bars_across,
    beside,
    drawing,
    legend,
    load_axis,
)
from medusa_ray.report.numbers import concurrency, in_order, rate
from medusa_ray.report.predicted import between
from medusa_ray.report.text import in_rank, measured_loads
from medusa_ray.report.verdict import MIN_SPEEDUP


def speedup(report: dict[str, Any]) -> Picture | None:
    """Speedup of TPOT with its interval, and of output tokens per second, by load; the baseline is 1."""
    points = {load: value for load, value in report["speedup"].items() if value["tpot"]}
    if not points:
        return None
    label = "Speedup by load. " + "; ".join(
        f"{load}: {value['tpot']:.2f} times" for load, value in points.items()
    )
    columns = {
        "load": list(points),
        "tpot": [value["tpot"] for value in points.values()],
        "tpot_low": [(value["ci95"] or [None])[0] for value in points.values()],
        "tpot_high": [(value["ci95"] or [None])[-1] for value in points.values()],
        "output_tokens_per_s": [value["output_tokens_per_s"] for value in points.values()],
    }
    with drawing("speedup", "Speedup by load", label, columns) as picture:
        ax = picture.axes
        heights = [
            h for v in points.values() for h in (*(v["ci95"] or ()), v["tpot"], v["output_tokens_per_s"] or 1)
        ]
        low, high = min(0.9, *heights), max(1.2, *heights)
        bottom, top = low - 0.12 * (high - low), high + 0.12 * (high - low)
        ax.axhspan(bottom, 1, color=LOSS, alpha=0.07, linewidth=0)
        ax.axhline(1, color=INK, linewidth=1)
        ax.axhline(MIN_SPEEDUP, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        for x, value in enumerate(points.values()):
            _speedup_mark(ax, x, value)
        end = report["break_even"].get("tpot", {}).get("concurrency")
        if end and (place := _place(list(points), end)) is not None:
            ax.axvline(place, color=LOSS, linewidth=1, linestyle=(0, (3, 2)))
            beside(ax, f"break-even {end:.0f}", (place, top), (4, -8), va="center", fontsize=8, color=LOSS)
        ax.set_ylim(bottom, top)
        ax.set_xlim(-0.5, len(points) - 0.35)
        load_axis(ax, list(points))
        ax.set_ylabel("times the baseline")
        at_right(ax, "baseline", 1)
        at_right(ax, "asked for", MIN_SPEEDUP)
    return picture


def _speedup_mark(ax: Axes, x: float, value: dict[str, Any]) -> None:
    colour = MEDUSA if value["tpot"] >= 1 else LOSS
    low, high = value["ci95"] or (value["tpot"], value["tpot"])
    ax.plot([x, x], [low, high], color=colour, linewidth=2, solid_capstyle="butt")
    ax.plot(x, value["tpot"], "o", color=colour, markersize=7)
    beside(ax, f"{value['tpot']:.2f}x", (x, value["tpot"]), (8, 0), va="center", weight="bold", color=colour)
    if value["output_tokens_per_s"]:
        ax.plot(
            x - 0.16, value["output_tokens_per_s"], "D", color="white", markeredgecolor=QUIET, markersize=5
        )


def _place(loads: list[str], number: float) -> float | None:
    """Where a concurrency stands among loads that are drawn one apart."""
    known = {concurrency(load): place for place, load in enumerate(loads) if concurrency(load)}
    return between({float(n): float(place) for n, place in known.items() if n}, number)


def token_time(report: dict[str, Any]) -> Picture | None:
    """Median and p99 of the time per output token of baseline and medusa, by load."""
    return _by_load(report, "tpot_ms", "token_time", "Time per output token", "ms per output token")


def first_token(report: dict[str, Any]) -> Picture | None:
    """Median and p99 of the time to first token of baseline and medusa, by load."""
    return _by_load(report, "ttft_ms", "first_token", "Time to first token", "ms to the first token")


def _by_load(report: dict[str, Any], key: str, name: str, title: str, unit: str) -> Picture | None:
    shown = [
        (load, arm, found) for load, arm, found in measured_loads(report) if arm in ("baseline", "medusa")
    ]
    shown = [part for part in shown if part[2][key] is not None]
    if not shown:
        return None
    loads, arms = in_order({load for load, _, _ in shown}), in_rank({arm: 0 for _, arm, _ in shown})
    columns: Columns = {"load": [load for load, _, _ in shown], "arm": [arm for _, arm, _ in shown]}
    columns |= {percent: [found[percent][key] for _, _, found in shown] for percent in ("p50", "p95", "p99")}
    label = f"{title} of each arm by load: bar to the median, line to the p99"
    with drawing(name, title, label, columns) as picture:
        ax, named = picture.axes, set[str]()
        for load, arm, found in shown:
            x = loads.index(load) + (arms.index(arm) - (len(arms) - 1) / 2) * 0.36
            colour, tail = arm_colours(arms)[arm], found["p99"][key]
            ax.bar(x, found[key], 0.32, color=colour, label=None if arm in named else arm)
            ax.plot([x, x], [found[key], tail], color=INK, linewidth=1)
            ax.plot(x, tail, "_", color=INK, markersize=7)
            named.add(arm)
        ax.set_ylim(0, 1.05 * max(columns["p99"]))
        load_axis(ax, loads)
        ax.set_ylabel(unit)
        legend(ax)
    return picture


def pareto(report: dict[str, Any]) -> Picture | None:
    """Output tokens per second of all users over those of one, each arm a curve over its loads."""
    shown = [
        (load, arm, found["p50"]["user_tokens_per_s"], found["output_tokens_per_s"])
        for load, arm, found in measured_loads(report)
        if concurrency(load) and found["p50"]["user_tokens_per_s"] and found["output_tokens_per_s"]
    ]
    if len({load for load, _, _, _ in shown}) < 2:
        return None
    columns = dict(
        zip(
            ("load", "arm", "user_tokens_per_s", "output_tokens_per_s"),
            map(list, zip(*shown, strict=True)),
            strict=True,
        )
    )
    label = "Throughput over what one user gets, a curve for each arm"
    with drawing("pareto", "Throughput and interactivity", label, columns) as picture:
        ax, arms = picture.axes, in_rank(report["arms"])
        for arm in arms:
            points = [(user, whole) for _, name, user, whole in shown if name == arm]
            if points:
                ax.plot(
                    *zip(*points, strict=True), "o-", color=arm_colours(arms)[arm], label=arm, markersize=5
                )
        ax.set_xlim(0, 1.08 * max(columns["user_tokens_per_s"]))
        ax.set_ylim(0, 1.08 * max(columns["output_tokens_per_s"]))
        ax.set_xlabel("tokens/s of one user")
        ax.set_ylabel("tokens/s of all")
        legend(ax, 3)
    return picture


def token_time_by_rate(report: dict[str, Any]) -> Picture | None:
    """Median and p99 of the time per output token by the rate of requests."""
    return _by_rate(
        report, "tpot_ms", "token_time_by_rate", "Time per output token by rate", "ms per output token"
    )


def first_token_by_rate(report: dict[str, Any]) -> Picture | None:
    """Median and p99 of the time to first token by the rate of requests."""
    return _by_rate(
        report, "ttft_ms", "first_token_by_rate", "Time to first token by rate", "ms to the first token"
    )


def _by_rate(report: dict[str, Any], key: str, name: str, title: str, unit: str) -> Picture | None:
    shown = [
        (load.partition("=")[0], rate(load), arm, found["p50"][key], found["p99"][key])
        for load, arm, found in measured_loads(report)
        if rate(load) and found["p50"][key] is not None and arm in ("baseline", "medusa")
    ]
    if not shown:
        return None
    names = ("profile", "requests_per_s", "arm", "p50", "p99")
    columns = dict(zip(names, map(list, zip(*shown, strict=True)), strict=True))
    with drawing(name, title, f"{title} of requests: median and p99", columns) as picture:
        ax = picture.axes
        for kind in dict.fromkeys(columns["profile"]):
            for arm, colour in (("baseline", BASELINE), ("medusa", MEDUSA)):
                lines = [line[1:] for line in shown if line[0] == kind and line[2] == arm]
                if not lines:
                    continue
                rates, _, middle, tail = zip(*lines, strict=True)
                mark = "o" if kind == "poisson" else "s"
                ax.plot(rates, middle, f"{mark}-", color=colour, label=f"{arm}, {kind}: median", markersize=5)
                ax.plot(
                    rates,
                    tail,
                    f"{mark}:",
                    color=colour,
                    label=f"{arm}, {kind}: p99",
                    markersize=5,
                    fillstyle="none",
                )
        ax.set_ylim(0, 1.08 * max(columns["p99"]))
        ax.set_xlabel("requests per second, sent")
        ax.set_ylabel(unit)
        legend(ax)
    return picture


def goodput(report: dict[str, Any]) -> Picture | None:
    """Requests per second that met the SLO, by load and arm."""
    shown = [(load, arm, found["goodput"]) for load, arm, found in measured_loads(report) if found["goodput"]]
    if not shown:
        return None
    loads, arms = in_order({load for load, _, _ in shown}), in_rank({arm: 0 for _, arm, _ in shown})
    columns: Columns = {"load": [load for load, _, _ in shown], "arm": [arm for _, arm, _ in shown]}
    columns |= {key: [good[key] for _, _, good in shown] for key in ("requests_per_s", "share")}
    columns |= {
        "share_low": [g["ci95"][0] for _, _, g in shown],
        "share_high": [g["ci95"][1] for _, _, g in shown],
    }
    label = "Goodput: requests per second that met the SLO, by load"
    with drawing("goodput", "Goodput under the SLO", label, columns) as picture:
        ax, named, width = picture.axes, set[str](), 0.8 / len(arms)
        for load, arm, good in shown:
            x = loads.index(load) + (arms.index(arm) - (len(arms) - 1) / 2) * width
            height = good["requests_per_s"] or 0
            colour = arm_colours(arms)[arm]
            ax.bar(x, height, 0.9 * width, color=colour, label=None if arm in named else arm)
            if len(arms) * len(loads) <= 12:
                beside(ax, f"{good['share']:.0%}", (x, height), (0, 2), ha="center", fontsize=8)
            named.add(arm)
        ax.set_ylim(0, 1.15 * max([height or 0 for height in columns["requests_per_s"]] + [0.1]))
        load_axis(ax, loads)
        ax.set_ylabel("good requests per second")
        legend(ax, 3)
    return picture


def engine(report: dict[str, Any]) -> Picture | None:
    """Tokens per second in one process, without a server: transformers, our baseline, medusa."""
    arms = (
        ("transformers", "transformers", RULE),
        ("baseline", "our engine, no heads", BASELINE),
        ("medusa", "our engine, medusa", MEDUSA),
    )
    shown = [
        (text, rate, colour) for arm, text, colour in arms if (rate := report["engine"][arm]["tokens_per_s"])
    ]
    if not shown:
        return None
    label = "In process, tokens per second. " + "; ".join(f"{text}: {rate:.0f}" for text, rate, _ in shown)
    columns = {"engine": [text for text, _, _ in shown], "tokens_per_s": [rate for _, rate, _ in shown]}
    with drawing(
        "engine", "In process, without a server", label, columns, 0.55 + 0.42 * len(shown)
    ) as picture:
        bars_across(picture.axes, shown, "{:.0f}")
        picture.axes.set_xlabel("tokens per second, one prompt at a time")
    return picture


# ------------------------------------------------------------------------------------------------ ramp


def ramp(told: dict[str, Any] | None) -> Picture | None:
    """Replicas and latency while the load rises and falls; both in shares of their highest, which the names tell."""
    if not told or not told["replicas"] or not told["latency"]:
        return None
    seconds, running, wanted = (list(column) for column in zip(*told["replicas"], strict=True))
    times, middle, tail = (list(column) for column in zip(*told["latency"], strict=True))
    steps = told["steps"]
    columns: dict[str, list[Any]] = {
        "series": ["concurrency"] * len(steps) + ["running"] * len(seconds) + ["wanted"] * len(seconds)
        + ["p50_s"] * len(times) + ["p99_s"] * len(times),
        "second": [*(step[0] for step in steps), *seconds, *seconds, *times, *times],
        "value": [float(v) for v in (*(step[1] for step in steps), *running, *wanted, *middle, *tail)],
    }  # fmt: skip
    label = f"Replicas from {min(running)} to {max(running)} and latency while the load changes"
    with drawing(
        "ramp", "Replicas while the load changes", label, columns, height=3.4, is_wide=True
    ) as picture:
        ax = picture.axes
        top = max(seconds[-1], times[-1])
        starts, numbers = zip(*steps, strict=True)
        ax.stairs(
            [number / max(numbers) for number in numbers], [*starts, max(top, starts[-1] + 1)], fill=True, color=RULE,
            label=f"requests at a time, of {max(numbers)}",
        )  # fmt: skip
        most = max(*running, *wanted)
        ax.step(seconds, [n / most for n in running], where="post", color=INK, label=f"replicas, of {most}")
        ax.step(
            seconds,
            [n / most for n in wanted],
            where="post",
            color=INK,
            linestyle=":",
            label="replicas wanted",
        )
        ax.plot(
            times,
            [s / max(tail) for s in middle],
            color=MEDUSA,
            label=f"median latency, of {max(tail):.2f} s",
        )
        ax.plot(times, [s / max(tail) for s in tail], color=CONTRAST, label="p99 latency, of the same")
        ax.set_ylim(0, 1.05)
        ax.set_yticks([0, 0.5, 1], ["0", "half", "most"])
        ax.margins(x=0)
        ax.set_xlabel("seconds")
        legend(ax)
    return picture
