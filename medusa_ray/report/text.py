"""report.json -> what a console prints of it: the benchmark table, its caption, its caveats."""

from typing import Any

from medusa_ray.report.numbers import in_order

# Figures of the benchmark table: title, unit, key of a load's figures, decimals.
COLUMNS = (
    ("Requests per Second", "req/sec", "requests_per_s", 2),
    ("Request Latency", "sec", "request_latency_s", 3),
    ("Time to First Token", "ms", "ttft_ms", 2),
    ("Inter Token Latency", "ms", "itl_ms", 2),
    ("Output Token Throughput", "tokens/sec", "output_tokens_per_s", 2),
    ("Acceleration", "tokens/step", "acceleration", 2),
)


def table(report: dict[str, Any], units_in: str = "cells") -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the benchmark table: one row per load and arm, baseline before medusa before peers.

    Units stand in the cells, as in the table that GuideLLM prints, or with units_in="headers" in the headers.
    """
    in_cells = units_in == "cells"
    titles = [title if in_cells else f"{title}, {unit}" for title, unit, _, _ in COLUMNS]
    arms = sorted(report["arms"], key=lambda arm: ({"baseline": 0, "medusa": 1}.get(arm, 2), arm))
    rows = []
    for load in in_order({load for arm in arms for load in report["arms"][arm]["load"]}):
        for arm in arms:
            measured = report["arms"][arm]["load"].get(load)
            if measured is None:
                continue
            figures = measured | {"acceleration": report["arms"][arm]["acceleration"]}
            sent = f"{measured['requests']}" + (
                f" ({measured['failed']} failed)" if measured["failed"] else ""
            )
            cells = [
                show(figures[key], f"{{:.{decimals}f}}" + (f" {unit}" if in_cells else ""))
                for _, unit, key, decimals in COLUMNS
            ]
            rows.append(
                [load, arm, sent, *cells, _speedup(report["speedup"].get(load) if arm == "medusa" else None)]
            )
    return ["Benchmark", "Arm", "Requests", *titles, "Speedup [95%]"], rows


def _speedup(speedup: dict[str, Any] | None) -> str:
    """Of the time per output token, with its interval when there is one."""
    if speedup is None or speedup["tpot"] is None:
        return "-"
    return f"{speedup['tpot']:.2f}x" + (
        " [{:.2f}, {:.2f}]".format(*speedup["ci95"]) if speedup["ci95"] else ""
    )


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


def caveats(report: dict[str, Any]) -> list[str]:
    """Sentences that must stand beside the figures."""
    found = []
    exact, served = (
        report["quality"]["exact_match"],
        report["acceptance"]["served"] or report["acceptance"]["chain"],
    )
    if exact is not None and exact < 0.5:
        acceleration = f"the acceleration of {served:.2f} tokens per step" if served else "the acceleration"
        found.append(
            f"Only {exact:.1%} of the base's answers match the reference: {acceleration} says nothing about "
            "the answers' quality."
        )
    own, peer = (report["engine"][arm]["tokens_per_s"] for arm in ("baseline", "transformers"))
    if own and peer and own < 0.8 * peer:
        found.append(
            f"The baseline is weak: in process it makes {own:.0f} tokens/s where transformers makes "
            f"{peer:.0f}, so the speedup is overstated."
        )
    for arm, measured in report["arms"].items():
        failed, sent = (
            sum(load[key] for load in measured["load"].values()) for key in ("failed", "requests")
        )
        if failed:
            found.append(f"{failed} of {sent} requests to {arm} failed; they are left out of its times.")
    return found
