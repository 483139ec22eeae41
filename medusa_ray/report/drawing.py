"""A figure under construction -> SVG that goes straight into a page, and files that stand alone.

Text stays text: it takes the page's own font, can be searched, and costs few bytes. matplotlib lays it out
with DejaVu Sans, which is wider than the fonts of the page, so what does not overlap here does not there.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

INK, QUIET, RULE = "#1c2733", "#5b6673", "#d9dee4"
BASELINE, MEDUSA, PALE, CONTRAST, LOSS = "#8d98a5", "#1667a8", "#8fbfe6", "#b8651b", "#b3261e"
HEADS = ("#0b3c66", "#1667a8", "#3f8fcf", "#74a9d8")  # dark to light; a fifth head starts over
PEERS = ("#b8651b", "#6b4fa0", "#2d7d6b", "#a03a5b")

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
PNG_DPI = 150
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Columns = dict[str, list[Any]]


@dataclass
class Picture:
    """What was drawn and the numbers that it shows, a value a row in each column."""

    name: str
    title: str
    label: str  # what a screen reader says
    columns: Columns
    is_wide: bool  # takes the room of two
    figure: Figure
    axes: Axes = field(init=False)

    def __post_init__(self) -> None:
        self.axes = self.figure.subplots()

    @cached_property
    def svg(self) -> str:
        """A file of its own."""
        file = io.StringIO()
        with self._style():
            self.figure.savefig(file, format="svg", metadata=NO_METADATA)
        return file.getvalue()

    def inline(self) -> str:
        """An element of an HTML page, without namespaces, own fonts or global style."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)
        svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
        svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg).replace("xlink:href", "href")
        head = re.search(r'viewBox="([^"]*)"', svg)
        assert head, "matplotlib writes a viewBox"
        kind = "wide" if self.is_wide else ""
        opening = (
            f'<svg class="{kind}" viewBox="{head[1]}" role="img" aria-label="{html.escape(self.label)}">'
        )
        return opening + svg[svg.index(">") + 1 :].strip()

    def png(self) -> bytes:
        """On white: it goes where nobody knows the background."""
        file = io.BytesIO()
        with self._style():
            self.figure.savefig(file, format="png", dpi=PNG_DPI, facecolor="white")
        return file.getvalue()

    def _style(self) -> Any:
        # The salt makes the SVG's ids unique within a page, and the same every time.
        return matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name})


@contextmanager
def drawing(
    name: str, title: str, label: str, columns: Columns, height: float = HEIGHT, is_wide: bool = False
) -> Iterator[Picture]:
    """A picture with axes to draw on; after the `with` block it is laid out."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH if is_wide else WIDTH, height), layout="constrained")
        picture = Picture(name, title, label, columns, is_wide, figure)
        yield picture
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # as it is now, for each format


# ------------------------------------------------------------------------------------------------ parts of pictures


def beside(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text some points away from a place in the data."""
    ax.annotate(text, at, offset, textcoords="offset points", **style)


def at_right(ax: Axes, text: str, y: float, color: str = QUIET) -> None:
    """Text at that height, right of the axes."""
    beside(ax, text, (1, y), (5, 0), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=color)


def percent_axis(ax: Axes) -> None:
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])


def legend(ax: Axes, columns: int = 2) -> None:
    """Names of the colours above the axes, where no bar can meet them."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.03),
        ncols=columns,
        handlelength=0.9,
        handleheight=0.9,
        borderaxespad=0,
    )


def bars_across(ax: Axes, shown: Sequence[tuple[str, float, str]], form: str) -> None:
    """One bar a line, its name at the left and its value at its end: (name, value, colour)."""
    for y, (name, value, colour) in enumerate(shown):
        ax.barh(y, value, 0.6, color=colour)
        beside(ax, form.format(value), (value, y), (4, 0), va="center", weight="bold")
        beside(ax, name, (0, y), (-6, 0), va="center", ha="right")
    ax.set_xlim(0, 1.12 * max(value for _, value, _ in shown))
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)


def shares_across(ax: Axes, shown: Sequence[tuple[str, float, str]], colour: str, rest: str) -> None:
    """One whole bar a line, filled to a share: (name at the left, share, text at the right)."""
    for y, (name, share, text) in enumerate(shown):
        ax.barh(y, 1, 0.55, color=rest)
        ax.barh(y, share, 0.55, color=colour)
        beside(ax, text, (1, y), (6, 0), va="center", weight="bold")
        beside(ax, name, (0, y), (-6, 0), va="center", ha="right")
    ax.set_xlim(0, 1)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_axis_off()


def mixed(one: str, other: str, share: float) -> tuple[float, ...]:
    """The colour `share` of the way from one to the other."""
    return tuple((1 - share) * a + share * b for a, b in zip(to_rgb(one), to_rgb(other), strict=True))


def apart(values: Sequence[float], gap: float) -> list[float]:
    """The values in their order, pushed upwards until neighbours are `gap` apart: heights of labels."""
    placed: dict[int, float] = {}
    floor = float("-inf")
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        floor = placed[index] = max(values[index], floor + gap)
    return [placed[index] for index in range(len(values))]


def load_axis(ax: Axes, loads: Sequence[str]) -> None:
    """Loads one apart."""
    ticks = [load.removeprefix("concurrency=").replace("=", "\n") for load in loads]
    ax.set_xticks(range(len(loads)), ticks)
    is_closed = not any("\n" in tick for tick in ticks)
    ax.set_xlabel(
        "requests at a time" if is_closed else "requests at a time, or requests per second of an open load"
    )


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """The colour of each arm, the same in every picture."""
    own = {"baseline": BASELINE, "medusa": MEDUSA}
    peers = [arm for arm in arms if arm not in own]
    return {arm: own.get(arm) or PEERS[peers.index(arm) % len(PEERS)] for arm in arms}
