"""report.json -> words and tables for a console and for Markdown: the benchmark, its caption, its caveats."""

from collections import Counter
from typing import Any

from medusa_ray.report.comparable import in_words
from medusa_ray.report.numbers import in_order

# Figures of the benchmark table: title, unit, key of a load's figures, decimals.
COLUMNS = (
    ("Requests per Second", "req/sec", "requests_per_s", 2),
    ("Request Latency", "sec", "request_latency_s", 3),
    ("Time to First Token", "ms", "ttft_ms", 2),
    ("Inter Token Latency", "ms", "itl_ms", 2),
    ("Output Token Throughput", "tokens/sec", "output_tokens_per_s", 2),
    ("Acceleration", "tokens/step", "acceleration", 2),
    ("TPOT", "ms", "tpot_ms", 2),
)
MAX_LATE = 0.1  # of the median latency; a sender that keeps its schedule is late by milliseconds
Table = tuple[list[str], list[list[str]]]  # headers, rows


def table(report: dict[str, Any], units_in: str = "cells") -> Table:
    """The benchmark table: one row per load and arm, baseline before medusa before peers.

    Units stand in the cells, as in the table that GuideLLM prints, or with units_in="headers" in the headers.
    """
    in_cells = units_in == "cells"
    titles = [title if in_cells else f"{title}, {unit}" for title, unit, _, _ in COLUMNS]
    rows = []
    for load, arm, measured in measured_loads(report):
        sent = f"{measured['requests']}" + (f" ({measured['failed']} failed)" if measured["failed"] else "")
        cells = [
            show(measured[key], f"{{:.{decimals}f}}" + (f" {unit}" if in_cells else ""))
            for _, unit, key, decimals in COLUMNS
        ]
        speedup = speedup_cell(report["speedup"].get(load)) if arm == "medusa" else "-"
        rows.append([load, arm, sent, *cells, speedup])
    return ["Benchmark", "Arm", "Requests", *titles, "Speedup [95%]"], rows


def measured_loads(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Load, arm and figures, in the order of tables."""
    arms = in_rank(report["arms"])
    loads = in_order({load for arm in arms for load in report["arms"][arm]["load"]})
    return [
        (load, arm, report["arms"][arm]["load"][load])
        for load in loads
        for arm in arms
        if load in report["arms"][arm]["load"]
    ]


def in_rank(arms: dict[str, Any]) -> list[str]:
    """baseline, medusa, and then the peers by name."""
    return sorted(arms, key=lambda arm: ({"baseline": 0, "medusa": 1}.get(arm, 2), arm))


def speedup_cell(speedup: dict[str, Any] | None) -> str:
    """Of the time per output token, with its interval when there is one."""
    if speedup and speedup.get("not_comparable"):
        return "not comparable"
    return ratio(speedup["tpot"], speedup["ci95"]) if speedup else "-"


def ratio(point: float | None, interval: Any) -> str:
    """A quotient and its interval, as tables show it."""
    return show(point, "{:.2f}x") + (" [{:.2f}, {:.2f}]".format(*interval) if interval else "")


def predictions(report: dict[str, Any]) -> Table:
    """Predicted speedup beside the measured one; no rows where step times are not known."""
    places = {f"in process, batch {size}": found for size, found in report["predicted"]["engine"].items()}
    places |= {f"served, {load}": found for load, found in report["predicted"]["served"].items()}
    rows = [
        [
            place,
            show(found["acceleration"], "{:.2f}"),
            show(found["step_cost_ratio"], "{:.2f}"),
            show(found["predicted"], "{:.2f}x"),
            show(found["measured"], "{:.2f}x"),
            show(found["gap"], "{:+.0%}"),
        ]
        for place, found in places.items()
    ]
    return ["Where", "Tokens per step", "Step cost ratio", "Predicted", "Measured", "Gap"], rows


def at_equal_latency(report: dict[str, Any]) -> Table:
    """Output tokens per second of both arms at the baseline's own latencies."""
    kinds = (("tpot_ms", "{:.2f} ms per token"), ("request_latency_s", "{:.3f} s per request"))
    rows = [
        [
            form.format(found["at"]),
            found["load"],
            show(found["baseline"], "{:.1f}"),
            show(found["medusa"], "{:.1f}", "out of range"),
            ratio(found["ratio"], found["ci95"]),
        ]
        for key, form in kinds
        for found in report["equal_latency"][key]
    ]
    return ["Median latency", "Baseline's at", "Baseline, tokens/s", "Medusa, tokens/s", "Ratio [95%]"], rows


def categories(report: dict[str, Any]) -> Table:
    """Acceleration and speedup by kind of prompt, at the first load and the last that are comparable."""
    loads = in_order({load for found in report["categories"].values() for load in found["speedup"]})
    loads = loads[:1] + loads[1:][-1:]
    rows = [
        [
            name,
            str(found["requests"]),
            show(found["acceleration"], "{:.2f}"),
            *(speedup_cell(found["speedup"].get(load)) for load in loads),
        ]
        for name, found in report["categories"].items()
    ]
    return ["Category", "Requests", "Tokens per step", *(f"Speedup [95%], {load}" for load in loads)], rows


def show(value: float | None, form: str, absent: str = "-") -> str:
    """The value in that format, or `absent` for what was not measured."""
    return absent if value is None else form.format(value)


def caption(report: dict[str, Any]) -> str:
    """The line that belongs to every table and picture: model, hardware, versions."""
    hardware, versions = report["hardware"], report["versions"]
    units = (("gpu", ""), ("cpu", ""), ("cores", " cores"), ("memory_gib", " GiB"))
    parts = [str(report["model"].get("base", "unknown model"))]
    parts += [f"{hardware[key]}{unit}" for key, unit in units if hardware.get(key)]
    parts += [
        f"{name} {versions[name]}" for name in ("medusa_ray", "torch", "ray", "guidellm") if name in versions
    ]
    return " · ".join(parts)


# ------------------------------------------------------------------------------------------------ caveats


def caveats(report: dict[str, Any]) -> list[str]:
    """Sentences that must stand beside the figures, worst first."""
    return [
        *refusals(report),
        *_answers(report),
        *_weak_baseline(report),
        *_failures(report),
        *_late(report),
        *_prompts(report),
    ] + [line for line in (_unstable(report), _peers(report)) if line]


def refusals(report: dict[str, Any]) -> list[str]:
    """Why loads have no speedup; a reason that several share is said once."""
    reasons = {
        load: found["not_comparable"] for load, found in report["speedup"].items() if found["not_comparable"]
    }
    shared = Counter(reasons.values())
    found = [
        f"No speedup {', '.join(in_words(load) for load in reasons if reasons[load] == reason)}: {reason}."
        for reason in shared
    ]
    return found


def _answers(report: dict[str, Any]) -> list[str]:
    exact, acceptance = report["quality"]["exact_match"], report["acceptance"]
    served = acceptance["served"] or acceptance["chain"]
    if exact is None or exact >= 0.5:
        return []
    acceleration = f"the acceleration of {served:.2f} tokens per step" if served else "the acceleration"
    return [
        f"Only {exact:.1%} of the base's answers match the reference: {acceleration} says nothing about the answers' "
        "quality."
    ]


def _weak_baseline(report: dict[str, Any]) -> list[str]:
    own, peer = (report["engine"][arm]["tokens_per_s"] for arm in ("baseline", "transformers"))
    if not own or not peer or own >= 0.8 * peer:
        return []
    return [
        f"The baseline is weak: in process it makes {own:.0f} tokens/s where transformers makes {peer:.0f}, so the "
        "speedup is overstated."
    ]


def _failures(report: dict[str, Any]) -> list[str]:
    found = []
    for arm, measured in report["arms"].items():
        failed, sent = (
            sum(load[key] for load in measured["load"].values()) for key in ("failed", "requests")
        )
        if failed:
            found.append(f"{failed} of {sent} requests to {arm} failed; they are left out of its times.")
    return found


def _late(report: dict[str, Any]) -> list[str]:
    """Open loads that were not sent by their schedule."""
    found = []
    for load, arm, measured in measured_loads(report):
        late_s, latency_s = measured["p50"]["wait_s"] or 0, measured["p50"]["request_latency_s"] or 0
        if late_s > MAX_LATE * latency_s:
            found.append(
                f"Requests to {arm} {in_words(load)} were sent {late_s:.2f} s after they were due (median), which is "
                "in their latency: the server or the client could not keep up with the schedule."
            )
    return found


def _prompts(report: dict[str, Any]) -> list[str]:
    """What the benchmark found of its prompts, as far as it does not make them incomparable."""
    overlap = (report["checks"] or {}).get("overlap")
    if not overlap:
        return []
    if not overlap["checked"]:
        return [
            "Whether prompts are in the training data was not checked; if they are, acceptance is too good."
        ]
    if not overlap["exact"] and not overlap["near"]:
        return []
    return [
        f"In the training data: {overlap['exact']} of {overlap['of']} prompts, and {overlap['near']} more much like "
        "some there; acceptance may be better than on prompts to come."
    ]


def _unstable(report: dict[str, Any]) -> str | None:
    served = report["parity"]["served"]
    if not served["unstable"]:
        return None
    return (
        f"On {served['unstable']} of {served['prompts']} prompts the baseline's own greedy text changes with the "
        "load, so that the arms' texts are not compared there."
    )


def _peers(report: dict[str, Any]) -> str | None:
    peers = [arm for arm in in_rank(report["arms"])[2:] if (report["arms"][arm]["acceleration"] or 1) > 1]
    if not peers:
        return None
    names = ", ".join(peers)
    return f"Engines count steps each in their own way: compare the times of {names} with ours, not the acceleration."
