"""Figures of a report -> pictures, as SVG that goes straight into a page.

Text stays text: it takes the page's own font, can be searched, and costs few bytes. matplotlib lays it out
with DejaVu Sans, which is wider than the fonts of the page, so what does not overlap here does not there.
Each function returns None when the run lacks what it would show.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from medusa_ray.report.numbers import in_order

INK, QUIET, RULE = "#1c2733", "#5b6673", "#d9dee4"
BASELINE, MEDUSA, PALE, CONTRAST, LOSS = "#8d98a5", "#1667a8", "#8fbfe6", "#b8651b", "#b3261e"
HEADS = ("#0b3c66", "#1667a8", "#3f8fcf", "#74a9d8")  # dark to light; a fifth head starts over

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a model's name is a $
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
WIDTH, HEIGHT = 6.0, 3.0  # inches; the page scales


class Picture:
    """A figure under construction, and after the `with` block of `drawing` its `svg`."""

    svg: str = ""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes


@contextmanager
def drawing(name: str, label: str, height: float = HEIGHT, wide: bool = False) -> Iterator[Picture]:
    """Axes to draw on; `name` makes the SVG's ids unique within a page, `label` is what a screen reader says.

    A wide picture takes the room of two.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(2 * WIDTH if wide else WIDTH, height), layout="constrained")
        picture = Picture(figure.subplots())
        yield picture
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    picture.svg = _inline(file.getvalue(), label, "wide" if wide else "")


def _inline(svg: str, label: str, kind: str) -> str:
    """A whole SVG file -> an element of an HTML page, without namespaces, own fonts or global style."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg).replace("xlink:href", "href")
    head = re.search(r'viewBox="([^"]*)"', svg)
    assert head, "matplotlib writes a viewBox"
    opening = f'<svg class="{kind}" viewBox="{head[1]}" role="img" aria-label="{html.escape(label)}">'
    return opening + svg[svg.index(">") + 1 :].strip()


def _percent_axis(ax: Axes) -> None:
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])


def _short(load: str) -> str:
    return load.replace("concurrency=", "") if load.startswith("concurrency=") else load


# ------------------------------------------------------------------------------------------------ speed


def speedup(report: dict[str, Any], min_speedup: float) -> str | None:
    """Speedup of TPOT with its interval, and of output tokens per second, by load; the baseline is 1."""
    points = {load: value for load, value in report["speedup"].items() if value["tpot"]}
    if not points:
        return None
    label = "Speedup by load. " + "; ".join(
        f"{load}: {value['tpot']:.2f} times" for load, value in points.items()
    )
    with drawing("speedup", label) as picture:
        ax = picture.axes
        ax.axhline(1, color=INK, linewidth=1)
        ax.axhline(min_speedup, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        for x, value in enumerate(points.values()):
            colour = MEDUSA if value["tpot"] >= 1 else LOSS
            low, high = value["ci95"] or (value["tpot"], value["tpot"])
            ax.plot([x, x], [low, high], color=colour, linewidth=2, solid_capstyle="butt")
            ax.plot(x, value["tpot"], "o", color=colour, markersize=7)
            ax.annotate(
                f"{value['tpot']:.2f}x",
                (x, value["tpot"]),
                (8, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
                color=colour,
            )
            if value["output_tokens_per_s"]:
                ax.plot(
                    x - 0.16,
                    value["output_tokens_per_s"],
                    "D",
                    color="white",
                    markeredgecolor=QUIET,
                    markersize=5,
                )
        heights = [
            h for v in points.values() for h in (*(v["ci95"] or ()), v["tpot"], v["output_tokens_per_s"] or 1)
        ]
        low, high = min(0.9, *heights), max(1.2, *heights)
        ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
        ax.set_xlim(-0.5, len(points) - 0.35)
        ax.set_xticks(range(len(points)), [_short(load) for load in points])
        ax.set_xlabel("requests at a time")
        ax.set_ylabel("times the baseline")
        for y, text in ((1, "baseline"), (min_speedup, "asked for")):
            ax.annotate(
                text,
                (1, y),
                (4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=QUIET,
            )
    return picture.svg


def token_time(report: dict[str, Any]) -> str | None:
    """Median and p99 of the time per output token of baseline and medusa, by load."""
    arms = {
        arm: colour for arm, colour in (("baseline", BASELINE), ("medusa", MEDUSA)) if arm in report["arms"]
    }
    loads = in_order(
        {load for arm in arms for load, v in report["arms"][arm]["load"].items() if v["tpot_ms"]}
    )
    if not loads:
        return None
    with drawing(
        "token_time", "Time per output token of each arm by load: bar to the median, line to the p99"
    ) as picture:
        ax = picture.axes
        top = 0.0
        for index, (arm, colour) in enumerate(arms.items()):
            for x, load in enumerate(loads):
                measured = report["arms"][arm]["load"].get(load)
                if not measured or measured["tpot_ms"] is None:
                    continue
                place = x + (index - (len(arms) - 1) / 2) * 0.36
                ax.bar(place, measured["tpot_ms"], 0.32, color=colour, label=arm if x == 0 else None)
                ax.plot(
                    [place, place], [measured["tpot_ms"], measured["p99"]["tpot_ms"]], color=INK, linewidth=1
                )
                ax.plot(place, measured["p99"]["tpot_ms"], "_", color=INK, markersize=7)
                ax.annotate(
                    _figure(measured["tpot_ms"]),
                    (place, 0),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color="white" if arm == "medusa" else INK,
                )
                top = max(top, measured["p99"]["tpot_ms"])
        ax.set_ylim(0, 1.05 * top)
        ax.set_xticks(range(len(loads)), [_short(load) for load in loads])
        ax.set_xlabel("requests at a time")
        ax.set_ylabel("ms per output token")
        _legend(ax)
    return picture.svg


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ------------------------------------------------------------------------------------------------ acceptance


def by_position(report: dict[str, Any]) -> str | None:
    """Share of steps that accepted at least that many guesses, beside each head's top-1 on its own."""
    served = report["arms"].get("medusa", {}).get("accepted_per_position") or []
    top1 = report["heads"]["top1"]
    if not served and not top1:
        return None
    label = "Acceptance by position. Served: " + (
        ", ".join(f"{share:.0%}" for share in served) or "not measured"
    )
    with drawing("by_position", label) as picture:
        ax = picture.axes
        _pair_of_bars(
            ax,
            {
                "served: steps that got this far": (served, MEDUSA),
                "head alone: best guess right": (top1, PALE),
            },
        )
        count = max(len(served), len(top1))
        ax.set_xticks(range(count), [f"guess {position + 1}" for position in range(count)])
        _percent_axis(ax)
    return picture.svg


def _pair_of_bars(ax: Axes, series: dict[str, tuple[Sequence[float], str]]) -> None:
    shown = {name: value for name, value in series.items() if value[0]}
    for index, (name, (shares, colour)) in enumerate(shown.items()):
        places = [x + (index - (len(shown) - 1) / 2) * 0.38 for x in range(len(shares))]
        ax.bar(places, shares, 0.34, color=colour, label=name)
        for place, share in zip(places, shares, strict=True):
            ax.annotate(
                f"{share:.0%}", (place, share), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    _legend(ax)


def _legend(ax: Axes) -> None:
    """Names of the colours in one line above the axes, where no bar can meet them."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.03),
        ncols=2,
        handlelength=0.9,
        handleheight=0.9,
        borderaxespad=0,
    )


def step_sizes(report: dict[str, Any]) -> str | None:
    """Share of steps that committed 1, 2, ... tokens, and their mean, the acceleration."""
    arm = report["arms"].get("medusa", {})
    histogram = arm.get("acceptance_histogram")
    if not histogram or not sum(histogram):
        return None
    shares = [count / sum(histogram) for count in histogram]
    label = "Tokens committed per step: " + ", ".join(
        f"{n + 1}: {share:.0%}" for n, share in enumerate(shares)
    )
    with drawing("step_sizes", label) as picture:
        ax = picture.axes
        sizes = range(1, len(shares) + 1)
        ax.bar(sizes, shares, 0.6, color=MEDUSA)
        for size, share in zip(sizes, shares, strict=True):
            ax.annotate(
                f"{share:.0%}", (size, share), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
        ax.set_ylim(0, 1.25 * max(shares))
        ax.annotate(
            f"mean {arm['acceleration']:.2f} = acceleration",
            (1, 1),
            xycoords="axes fraction",
            ha="right",
            va="top",
            weight="bold",
        )
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_xticks(sizes)
        ax.set_xlabel("tokens committed by one step (1 + accepted guesses)")
    return picture.svg


def acceptance(report: dict[str, Any]) -> str | None:
    """Tokens per step: chain, calibrated trees and served, in domain; the chain out of domain."""
    trees = [key for key in report["acceptance"] if key.startswith("calibrated_")]
    names = {"chain": "chain, in domain", "out_of_domain_chain": "chain, out of domain"}
    names |= {tree: f"tree of {tree.removeprefix('calibrated_')}, in domain" for tree in trees} | {
        "served": "as served"
    }
    shown = {
        text: (report["acceptance"][key], key) for key, text in names.items() if report["acceptance"].get(key)
    }
    if not shown:
        return None
    label = "Tokens per step. " + "; ".join(f"{text}: {value:.2f}" for text, (value, _) in shown.items())
    with drawing("acceptance", label, height=0.55 + 0.42 * len(shown)) as picture:
        ax = picture.axes
        for y, (text, (value, key)) in enumerate(shown.items()):
            colour = CONTRAST if key.startswith("out_of_domain") else MEDUSA
            ax.barh(y, value, 0.6, color=colour)
            ax.annotate(
                f"{value:.2f}", (value, y), (4, 0), textcoords="offset points", va="center", weight="bold"
            )
            ax.annotate(text, (0, y), (-6, 0), textcoords="offset points", va="center", ha="right")
        ax.plot([1, 1], [-0.45, len(shown) - 0.5], color=INK, linewidth=1)
        ax.annotate("baseline", (1, -0.5), ha="center", va="bottom", fontsize=8, color=QUIET)
        ax.set_ylim(len(shown) - 0.5, -0.9)
        ax.set_xlim(0, 1.12 * max(value for value, _ in shown.values()))
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("tokens per step")
    return picture.svg


# ------------------------------------------------------------------------------------------------ heads


def curves(training: list[dict[str, Any]], key: str, name: str) -> str | None:
    """One measure of each head (`head_loss` or `top1`) over the optimizer steps."""
    lines = [line for line in training if line.get(key)]
    if len(lines) < 2:
        return None
    ends = lines[-1][key]
    label = f"{name} by optimizer step. At the end: " + "; ".join(
        f"head {h + 1}: {y:.2f}" for h, y in enumerate(ends)
    )
    with drawing(key, label, height=2.4) as picture:
        ax = picture.axes
        for head in range(len(ends)):
            values = [line[key][head] for line in lines]
            ax.plot([line["step"] for line in lines], values, color=HEADS[head % len(HEADS)], linewidth=1.6)
        ax.set_ylim(bottom=0)
        for head, y in enumerate(_apart(ends, 0.07 * ax.get_ylim()[1])):
            ax.annotate(
                f"head {head + 1}: {ends[head]:.2f}",
                (1, y),
                (5, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=HEADS[head % len(HEADS)],
            )
        ax.margins(x=0)
        ax.set_xlabel("optimizer step")
    return picture.svg


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values in their order, pushed upwards until neighbours are `gap` apart: heights of labels."""
    placed: dict[int, float] = {}
    floor = float("-inf")
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        floor = placed[index] = max(values[index], floor + gap)
    return [placed[index] for index in range(len(values))]


def tree(paths: Sequence[Sequence[int]]) -> str | None:
    """The token tree, root above, each node marked with the rank of its guess; best nodes darkest."""
    if not paths:
        return None
    walks = [tuple(path) for path in paths]
    across = _places(walks)
    depth = max(len(walk) for walk in walks)
    num_leaves = int(max(across.values())) + 1
    wide = num_leaves > 20
    size = min(
        9.0, 30 * WIDTH * (1 + wide) / num_leaves
    )  # a node's radius in points; neighbours do not touch
    label = f"The token tree: {len(walks)} nodes in {depth} levels below the root"
    with drawing("tree", label, 0.5 + 0.62 * (depth + 1), wide) as picture:
        ax = picture.axes
        for walk in walks:
            parent = walk[:-1]
            ax.plot(
                [across[parent], across[walk]],
                [1 - len(walk), -len(walk)],
                color=BASELINE,
                linewidth=0.8,
                zorder=1,
            )
        ax.plot(across[()], 0, "o", color=INK, markersize=size * 1.2)
        for order, walk in enumerate(walks):
            colour = _mix(MEDUSA, PALE, 0.8 * order / max(1, len(walks) - 1))
            ax.plot(across[walk], -len(walk), "o", color=colour, markersize=2 * size, markeredgewidth=0)
            if size > 3:
                ax.annotate(
                    str(walk[-1]),
                    (across[walk], -len(walk)),
                    ha="center",
                    va="center_baseline",
                    color="white",
                    fontsize=size,
                )
        for level in range(depth + 1):
            text = f"head {level}" if level else "base"
            ax.annotate(
                text,
                (0, -level),
                (-4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                color=QUIET,
            )
        ax.set_xlim(-1, num_leaves)
        ax.set_ylim(-depth - 0.5, 0.5)
        ax.set_axis_off()
    return picture.svg


def _mix(one: str, other: str, share: float) -> tuple[float, ...]:
    """The colour `share` of the way from one to the other."""
    return tuple((1 - share) * a + share * b for a, b in zip(to_rgb(one), to_rgb(other), strict=True))


def _places(walks: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Where each node stands: leaves one apart, a parent in the middle of its children. The root is ()."""
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for walk in sorted(walks):
        children.setdefault(walk[:-1], []).append(walk)
    across: dict[tuple[int, ...], float] = {}

    def place(walk: tuple[int, ...], num_leaves: int) -> int:
        if walk not in children:
            across[walk] = num_leaves
            return num_leaves + 1
        for child in children[walk]:
            num_leaves = place(child, num_leaves)
        across[walk] = (across[children[walk][0]] + across[children[walk][-1]]) / 2
        return num_leaves

    place((), 0)
    return across


# ------------------------------------------------------------------------------------------------ quality


def quality(report: dict[str, Any]) -> str | None:
    """How often the base's answers are right."""
    names = {"exact_match": "exact match", "execution_accuracy": "runs to the same result"}
    shown = {
        text: report["quality"][key] for key, text in names.items() if report["quality"][key] is not None
    }
    if not shown:
        return None
    label = "Quality of the base. " + "; ".join(f"{text}: {share:.0%}" for text, share in shown.items())
    with drawing("quality", label, height=0.5 + 0.45 * len(shown)) as picture:
        ax = picture.axes
        for y, (text, share) in enumerate(shown.items()):
            ax.barh(y, 1, 0.55, color=RULE)
            ax.barh(y, share, 0.55, color=MEDUSA if share >= 0.5 else LOSS)
            ax.annotate(
                f"{share:.1%}", (1, y), (6, 0), textcoords="offset points", va="center", weight="bold"
            )
            ax.annotate(text, (0, y), (-6, 0), textcoords="offset points", va="center", ha="right")
        ax.set_xlim(0, 1)
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set_axis_off()
    return picture.svg


def engine(report: dict[str, Any]) -> str | None:
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
    with drawing("engine", label, height=0.55 + 0.42 * len(shown)) as picture:
        ax = picture.axes
        for y, (text, rate, colour) in enumerate(shown):
            ax.barh(y, rate, 0.6, color=colour)
            ax.annotate(
                _figure(rate), (rate, y), (4, 0), textcoords="offset points", va="center", weight="bold"
            )
            ax.annotate(text, (0, y), (-6, 0), textcoords="offset points", va="center", ha="right")
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set_xlim(0, 1.12 * max(rate for _, rate, _ in shown))
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("tokens per second, one prompt at a time")
    return picture.svg
