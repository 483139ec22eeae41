"""Two runs -> their figures side by side: how much each changed, and whether that is beyond both intervals.

A change counts where the 95% intervals do not meet, which asks for more than a test of the difference would: of runs
that are the same, far fewer than 5% of the figures then seem to differ.
"""

from collections.abc import Iterator
from typing import Any

from medusa_ray import provenance
from medusa_ray.records import SCHEMA_VERSION
from medusa_ray.report.elements import caveat, document, header, quiet, table, verdict
from medusa_ray.report.numbers import in_order
from medusa_ray.report.text import Table, in_rank, measured_loads, show

LESS_IS_BETTER = ("request_latency_s", "ttft_ms", "tpot_ms")
FIGURES = (*LESS_IS_BETTER, "requests_per_s", "output_tokens_per_s")
SPEEDUPS = {"tpot": "ci95", "output_tokens_per_s": "output_tokens_per_s_ci95"}
RULE = (
    "Change is B over A, less one. It is beyond noise where the 95% intervals of the two do not meet. Figures are "
    "medians; what they mean is at the end of each report."
)


def compare(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """compare.json of two reports by the names of their folders, A before B; for its keys see `schema`."""
    (name_a, a), (name_b, b) = reports.items()
    return {
        "schema_version": SCHEMA_VERSION,
        "a": name_a,
        "b": name_b,
        "verdicts": {"a": a["verdict"], "b": b["verdict"]},
        "notes": [*_other_conditions(a, b), *_other_loads(a, b)],
        "figures": [*_figures(a, b), *_speedups(a, b)],
    }


def _other_conditions(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """What a change may come from, beside what was to be compared."""
    for what in ("hardware", "versions", "model", "slo"):
        for key, was, now in provenance.differences(a[what] or {}, b[what] or {}):
            yield f"{what} {key} is {was} in A and {now} in B."


def _other_loads(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    for arm in in_rank(a["arms"] | b["arms"]):
        loads = [report["arms"].get(arm, {"load": {}})["load"].keys() for report in (a, b)]
        for name, only in (("A", loads[0] - loads[1]), ("B", loads[1] - loads[0])):
            if only:
                yield f"{arm} was measured in {name} alone at {', '.join(in_order(only))}."


def _figures(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    both = [{(load, arm): found for load, arm, found in measured_loads(report)} for report in (a, b)]
    for (load, arm), one in both[0].items():
        if other := both[1].get((load, arm)):
            for name in (*FIGURES, "acceleration"):
                bounds = one["ci95"].get(name), other["ci95"].get(name)
                yield _difference((arm, load, name), (one[name], other[name]), bounds)


def _speedups(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for load in in_order(a["speedup"].keys() & b["speedup"].keys()):
        one, other = a["speedup"][load], b["speedup"][load]
        for name, bounds in SPEEDUPS.items():
            place = ("medusa", load, f"speedup, {name}")
            yield _difference(place, (one[name], other[name]), (one[bounds], other[bounds]))


def _difference(
    place: tuple[str, str, str], values: tuple[float | None, float | None], bounds: tuple[Any, Any]
) -> dict[str, Any]:
    (arm, load, figure), (a, b), (bounds_a, bounds_b) = place, values, bounds
    beyond = None
    if bounds_a and bounds_b:
        beyond = bounds_a[1] < bounds_b[0] or bounds_b[1] < bounds_a[0]
    return {
        **{"arm": arm, "load": load, "figure": figure, "a": a, "b": b},
        "change": b / a - 1 if a and b is not None else None,
        **{"a_ci95": bounds_a, "b_ci95": bounds_b, "beyond": beyond},
    }


# ------------------------------------------------------------------------------------------------ shown


def comparison_table(found: dict[str, Any]) -> Table:
    """One row per figure that was measured in both."""
    rows = [
        [
            *(line["load"], line["arm"], line["figure"]),
            _bounded(line["a"], line["a_ci95"]),
            _bounded(line["b"], line["b_ci95"]),
            show(line["change"], "{:+.1%}"),
            _judged(line),
        ]
        for line in found["figures"]
        if line["a"] is not None and line["b"] is not None
    ]
    return ["Load", "Arm", "Figure", "A [95%]", "B [95%]", "Change", "Beyond noise"], rows


def _bounded(value: float, bounds: Any) -> str:
    return f"{value:.4g}" + (" [{:.4g}, {:.4g}]".format(*bounds) if bounds else "")


def _judged(line: dict[str, Any]) -> str:
    if not line["beyond"]:
        return "-" if line["beyond"] is None else "no"
    return "better" if (line["change"] < 0) == (line["figure"] in LESS_IS_BETTER) else "worse"


def render(found: dict[str, Any]) -> str:
    """compare.html."""
    headers, rows = comparison_table(found)
    title = "Medusa report: two runs"
    return document(
        title,
        [
            header(title, f"A is {found['a']}, B is {found['b']}"),
            *(f"<h2>{name.upper()}</h2>{verdict(found['verdicts'][name])}" for name in ("a", "b")),
            *(caveat(line) for line in found["notes"]),
            "<h2>Figures</h2>",
            table(
                headers, rows, num_text=3, kind=lambda cell: {"better": "gain", "worse": "loss"}.get(cell, "")
            ),
            quiet(RULE),
        ],
    )
