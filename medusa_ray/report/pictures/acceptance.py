"""What steps accepted -> pictures. Each is None when the run lacks what it would show."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from medusa_ray.report.drawing import (
    BASELINE,
    CONTRAST,
    INK,
    MEDUSA,
    PALE,
    QUIET,
    WIDTH,
    Columns,
    Picture,
    bars_across,
    beside,
    drawing,
    legend,
    mixed,
    percent_axis,
)


def by_position(report: dict[str, Any]) -> Picture | None:
    """Share of steps that accepted at least that many guesses, of those that came so far, and each head's top-1."""
    arm = report["arms"].get("medusa", {})
    served, top1 = arm.get("accepted_per_position") or [], report["heads"]["top1"]
    if not served and not top1:
        return None
    given = [share or 0.0 for share in arm.get("accepted_per_position_conditional") or []]
    label = "Acceptance by position. Served: " + (
        ", ".join(f"{share:.0%}" for share in served) or "not measured"
    )
    count = max(len(served), len(top1))
    series = {
        "steps that got this far": (served, MEDUSA),
        "of those that got to the one before": (given, PALE),
        "head alone: best guess right": (top1, BASELINE),
    }
    columns = {"guess": list(range(1, count + 1))} | {
        name: [*shares, *[None] * (count - len(shares))] for name, (shares, _) in series.items()
    }
    with drawing("by_position", "Acceptance by position", label, columns) as picture:
        _bars(picture.axes, {name: shown for name, shown in series.items() if shown[0]})
        picture.axes.set_xticks(range(count), [f"guess {position + 1}" for position in range(count)])
        percent_axis(picture.axes)
    return picture


def _bars(ax: Axes, series: dict[str, tuple[Sequence[float], str]]) -> None:
    width = 0.84 / len(series)
    for index, (name, (shares, colour)) in enumerate(series.items()):
        places = [x + (index - (len(series) - 1) / 2) * width for x in range(len(shares))]
        ax.bar(places, shares, 0.92 * width, color=colour, label=name)
        for place, share in zip(places, shares, strict=True):
            beside(ax, f"{share:.0%}", (place, share), (0, 2), ha="center", fontsize=8)
    legend(ax)


def step_sizes(report: dict[str, Any]) -> Picture | None:
    """Share of steps that committed 1, 2, ... tokens, and their mean, the acceleration."""
    arm = report["arms"].get("medusa", {})
    histogram = arm.get("acceptance_histogram")
    if not histogram or not sum(histogram):
        return None
    shares = [count / sum(histogram) for count in histogram]
    sizes = list(range(1, len(shares) + 1))
    label = "Tokens committed per step: " + ", ".join(
        f"{n}: {share:.0%}" for n, share in zip(sizes, shares, strict=True)
    )
    columns = {"tokens": sizes, "steps": histogram, "share": shares}
    with drawing("step_sizes", "Tokens per step", label, columns) as picture:
        ax = picture.axes
        ax.bar(sizes, shares, 0.6, color=MEDUSA)
        for size, share in zip(sizes, shares, strict=True):
            beside(ax, f"{share:.0%}", (size, share), (0, 2), ha="center", fontsize=8)
        ax.set_ylim(0, 1.25 * max(shares))
        text = f"mean {arm['acceleration']:.2f} = acceleration"
        ax.annotate(text, (1, 1), xycoords="axes fraction", ha="right", va="top", weight="bold")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_xticks(sizes)
        ax.set_xlabel("tokens committed by one step (1 + accepted guesses)")
    return picture


def acceptance(report: dict[str, Any]) -> Picture | None:
    """Tokens per step: chain, calibrated trees and served, in domain; the chain out of domain."""
    trees = [key for key in report["acceptance"] if key.startswith("calibrated_")]
    names = {"chain": "chain, in domain", "out_of_domain_chain": "chain, out of domain"}
    names |= {tree: f"tree of {tree.removeprefix('calibrated_')}, in domain" for tree in trees} | {
        "served": "as served"
    }
    shown = [
        (text, value, CONTRAST if key.startswith("out_of_domain") else MEDUSA)
        for key, text in names.items()
        if (value := report["acceptance"].get(key))
    ]
    if not shown:
        return None
    label = "Tokens per step. " + "; ".join(f"{text}: {value:.2f}" for text, value, _ in shown)
    columns = {"what": [text for text, _, _ in shown], "tokens_per_step": [value for _, value, _ in shown]}
    title = "In domain and out of domain"
    with drawing("acceptance", title, label, columns, height=0.55 + 0.42 * len(shown)) as picture:
        ax = picture.axes
        bars_across(ax, shown, "{:.2f}")
        ax.plot([1, 1], [-0.45, len(shown) - 0.5], color=INK, linewidth=1)
        ax.annotate("baseline", (1, -0.5), ha="center", va="bottom", fontsize=8, color=QUIET)
        ax.set_ylim(len(shown) - 0.5, -0.9)
        ax.set_xlabel("tokens per step")
    return picture


def tree(paths: Sequence[Sequence[int]]) -> Picture | None:
    """The token tree, root above, each node marked with the rank of its guess; best nodes darkest."""
    if not paths:
        return None
    walks = [tuple(path) for path in paths]
    across = _places(walks)
    depth = max(len(walk) for walk in walks)
    num_leaves = int(max(across.values())) + 1
    is_wide = num_leaves > 20
    # A node's radius in points; neighbours do not touch.
    size = min(9.0, 30 * WIDTH * (1 + is_wide) / num_leaves)
    label = f"The token tree: {len(walks)} nodes in {depth} levels below the root"
    columns: Columns = {
        "order": list(range(1, len(walks) + 1)),
        "walk": [" ".join(map(str, walk)) for walk in walks],
    }
    with drawing("tree", "Token tree", label, columns, 0.5 + 0.62 * (depth + 1), is_wide) as picture:
        ax = picture.axes
        for walk in walks:
            parent = walk[:-1]
            ends = [across[parent], across[walk]], [1 - len(walk), -len(walk)]
            ax.plot(*ends, color=BASELINE, linewidth=0.8, zorder=1)
        ax.plot(across[()], 0, "o", color=INK, markersize=size * 1.2)
        for order, walk in enumerate(walks):
            colour = mixed(MEDUSA, PALE, 0.8 * order / max(1, len(walks) - 1))
            ax.plot(across[walk], -len(walk), "o", color=colour, markersize=2 * size, markeredgewidth=0)
            if size > 3:
                style: dict[str, Any] = {
                    "ha": "center",
                    "va": "center_baseline",
                    "color": "white",
                    "fontsize": size,
                }
                ax.annotate(str(walk[-1]), (across[walk], -len(walk)), **style)
        for level in range(depth + 1):
            text, style = (
                f"head {level}" if level else "base",
                {"va": "center", "fontsize": 8, "color": QUIET},
            )
            beside(ax, text, (0, -level), (-4, 0), xycoords=("axes fraction", "data"), ha="right", **style)
        ax.set_xlim(-1, num_leaves)
        ax.set_ylim(-depth - 0.5, 0.5)
        ax.set_axis_off()
    return picture


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
