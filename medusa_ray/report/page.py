"""Figures and pictures -> report.html: the verdict first, what each number means last."""

from typing import Any

from medusa_ray.report import text
from medusa_ray.report.definitions import DEFINITIONS
from medusa_ray.report.drawing import Picture
from medusa_ray.report.elements import (
    caveat,
    definitions,
    document,
    escape,
    figure,
    folded,
    header,
    quiet,
    section,
    table,
    verdict,
)
from medusa_ray.report.summary import Inputs
from medusa_ray.report.text import caption, show

Pictures = dict[str, Picture]


def render(report: dict[str, Any], inputs: Inputs, pictures: Pictures) -> str:
    """The whole page."""
    title = f"Medusa report: {report['model'].get('base', 'unknown model')}"
    return document(
        title,
        [
            header(title, caption(report)),
            verdict(report["verdict"]),
            _tiles(report),
            *[caveat(line) for line in text.caveats(report)],
            _absent(report, inputs, pictures),
            _benchmark(report, inputs),
            _other_tables(report),
            _speed(report, inputs, pictures),
            _acceptance(report, inputs, pictures),
            _quality(report, inputs, pictures),
            _training(report, pictures),
            "<h2>What each number means</h2>",
            definitions(DEFINITIONS),
            _origin(report, inputs),
        ],
    )


# ------------------------------------------------------------------------------------------------ key numbers


def _tiles(report: dict[str, Any]) -> str:
    tiles = [*_speed_tiles(report), *_other_tiles(report)]
    cells = (
        f"<span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span>"
        for name, value, note in tiles
    )
    inner = "".join(f'<div class="tile">{cell}</div>' for cell in cells)
    return f'<div class="tiles" style="--columns:{len(tiles)}">{inner}</div>' if tiles else ""


def _speed_tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and note of: speedup at the lowest and at full load, acceleration, time to first token."""
    loads, tiles = list(report["speedup"]), []
    for load in loads[:1] + [load for load in loads[1:] if load == "throughput"]:
        speedup, requests = report["speedup"][load], report["arms"]["medusa"]["load"][load]["requests"]
        interval = (
            "95% interval {:.2f} to {:.2f}".format(*speedup["ci95"]) if speedup["ci95"] else "no interval"
        )
        interval = "not comparable" if speedup["not_comparable"] else interval
        note = f"{load}, per output token; {interval}; n\u00a0=\u00a0{requests}"
        tiles.append(
            ("Speedup" if load == loads[0] else "At full load", show(speedup["tpot"], "{:.2f}x"), note)
        )
    if served := report["acceptance"]["served"]:
        answered = sum(
            load["requests"] - load["failed"] for load in report["arms"]["medusa"]["load"].values()
        )
        note = f"tokens per step over all loads; n\u00a0=\u00a0{answered}; not a speedup"
        tiles.append(("Acceleration", f"{served:.2f}", note))
    if end := report["break_even"].get("tpot"):
        point, _, interval = end["text"].partition(" (")
        note = f"concurrency, per output token; {interval.removesuffix(')') or 'no interval'}"
        tiles.append(("Break-even", point, note))
    for load in loads[:1]:
        before, after = (report["arms"][arm]["load"][load]["ttft_ms"] for arm in ("baseline", "medusa"))
        if before and after:
            note = f"{before:.1f} to {after:.1f} ms, {load}"
            tiles.append(("Time to first token", f"{round(after / before - 1, 2) + 0:+.0%}", note))
    return tiles


def _other_tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and note of: parity, quality."""
    parity, quality, tiles = report["parity"], report["quality"], []
    if parity["prompts"]:
        tiles.append(("Same text", "{token_exact} / {prompts}".format(**parity), "prompts, token for token"))
    elif parity["served"]["prompts"]:
        tiles.append(("Same text", "{equal} / {prompts}".format(**parity["served"]), "prompts, as served"))
    if quality["exact_match"] is not None:
        ran = show(quality["execution_accuracy"], "; {:.1%} run to the same result", "")
        tiles.append(("Exact match", f"{quality['exact_match']:.1%}", f"of the base's answers{ran}"))
    return tiles


def _absent(report: dict[str, Any], inputs: Inputs, pictures: Pictures) -> str:
    """One sentence that names what the run did not measure, so that nobody takes a gap for a good result."""
    parts = {
        "speed of both arms": report["speedup"],
        "parity": report["parity"]["prompts"],
        "exact match": report["quality"]["exact_match"] is not None,
        "execution accuracy": report["quality"]["execution_accuracy"] is not None,
        "accuracy of the heads": report["heads"]["top1"],
        "acceptance out of domain": report["acceptance"]["out_of_domain_chain"],
        "speed in process": report["engine"]["speedup"],
        "an engine of another make beside the baseline": inputs.traffic.get("external") in report["arms"],
        "goodput (the traffic has no SLO)": "goodput" in pictures,
        "latency by rate of requests": "token_time_by_rate" in pictures,
        "replicas under a changing load": "ramp" in pictures,
        "cost of a step": "step_cost" in pictures,
        "where the time of a step goes": "step_time" in pictures,
        "speedup by category": report["categories"],
        "predicted speedup": report["predicted"]["engine"] or report["predicted"]["served"],
        "training curves": inputs.training,
        "held-out tokens per step while training": "held_out" in pictures or not inputs.training,
    }
    absent = [name for name, found in parts.items() if not found]
    return quiet(f"Not measured in this run: {', '.join(absent)}.") if absent else ""


# ------------------------------------------------------------------------------------------------ tables


def _benchmark(report: dict[str, Any], inputs: Inputs) -> str:
    if not report["arms"]:
        return ""
    forms = {
        "rounds": "{} rounds, arms interleaved",
        "num_warmup": "{} warm-up requests left out",
        "max_tokens": "at most {} tokens",
        "max_concurrency": "{} requests in flight under throughput",
        "temperature": "temperature {:g}",
    }
    traffic = inputs.traffic
    told = ", ".join(
        [*(form.format(traffic[key]) for key, form in forms.items() if key in traffic), "medians"]
    )
    headers, rows = text.table(report, units_in="headers")
    note = (
        f'<p class="quiet">{escape(caption(report))}<br>Traffic: {escape(told)}. Rules are at the end; p50, p95 and '
        "p99 of all figures are in report.json.</p>"
    )
    return "<h2>Benchmark</h2>" + table(headers, rows, num_text=2) + note


def _other_tables(report: dict[str, Any]) -> str:
    shown = (
        (
            "Predicted and measured speedup",
            text.predictions(report),
            "Acceleration over the step cost ratio; per output token.",
        ),
        (
            "Speedup at equal latency",
            text.at_equal_latency(report),
            "What each arm makes at the same median latency.",
        ),
        (
            "By category",
            text.categories(report),
            "Of the time per output token; green and red are beyond noise.",
        ),
    )
    return "".join(
        f"<h3>{escape(title)}</h3>{table(headers, rows, kind=_beyond_noise, is_narrow=True)}{quiet(note)}"
        for title, (headers, rows), note in shown
        if rows
    )


def _beyond_noise(cell: str) -> str:
    """The class of a ratio whose interval, as in `text.ratio`, leaves out 1."""
    _, _, interval = cell.partition("x [")
    if not interval:
        return ""
    low, high = (float(bound) for bound in interval.removesuffix("]").split(", "))
    return "gain" if low > 1 else "loss" if high < 1 else ""


def _serve_paths(inputs: Inputs) -> str | None:
    paths = inputs.bench.get("serve_paths")
    if not paths:
        return None
    columns = list(dict.fromkeys(key for figures in paths.values() for key in figures))
    rows = [[path, *(_plain(figures.get(key)) for key in columns)] for path, figures in paths.items()]
    return table(["Path", *columns], rows)


def _plain(value: Any) -> str:
    return show(value, "{:.3g}" if isinstance(value, float) else "{}")


# ------------------------------------------------------------------------------------------------ pictures


def _drawn(pictures: Pictures, notes: dict[str, str]) -> list[str]:
    """The pictures that there are of those named, each with its note; wide ones scroll on a phone."""
    shown = [(pictures[name], note) for name, note in notes.items() if name in pictures]
    return [
        figure(
            picture.title,
            f'<div class="scroll">{picture.inline()}</div>' if picture.is_wide else picture.inline(),
            note,
        )
        for picture, note in shown
    ]


def _speed(report: dict[str, Any], inputs: Inputs, pictures: Pictures) -> str:
    counts = {load["requests"] for arm in report["arms"].values() for load in arm["load"].values()}
    many = (
        "n = " + " to ".join(str(count) for count in dict.fromkeys((min(counts), max(counts))))
        if counts
        else ""
    )
    served = report["acceptance"]["served"]
    beside = show(served, "; acceleration {:.2f} tokens per step", "")
    model = report["model"]
    ran = f"{model.get('engine_mode', 'mode unknown')}, {model.get('engine_threads', '?')} threads"
    slo = ", ".join(f"{key} {value:g}" for key, value in (report["slo"] or {}).items() if value is not None)
    in_process = show(report["engine"]["speedup"], " Speedup {:.2f}x.", "")
    notes = {
        "speedup": "Circles: time per output token, with its 95% interval; below 1 it is slower. Diamonds: output "
        f"tokens per second. {many} requests per arm and load{beside}.",
        "pareto": f"One curve per arm, one point per concurrency; further out is better. {many}.",
        "token_time": f"Bars to the median, thin lines to the p99. {many} requests per arm and load.",
        "first_token": f"Bars to the median, thin lines to the p99. {many} requests per arm and load.",
        "token_time_by_rate": "Open load: requests come by schedule, whatever is still in flight.",
        "first_token_by_rate": "Open load; time that a request waited to be sent counts.",
        "goodput": f"SLO: {slo}. Above each bar: the share of requests that met it.",
        "ramp": "Of the ramp scenario; no figure elsewhere is of it.",
        "engine": f"Our engine with and without heads runs in the same way ({ran}).{in_process}",
        "step_time": "Mean tree and measured step times; what is left is sampling, Python, HTTP, and waiting.",
        "step_cost": "As the server measured it when it started.",
    }
    paths = figure(
        "What the HTTP path costs",
        _serve_paths(inputs),
        "The same engine behind each of Ray Serve's HTTP paths.",
    )
    return section("Speed", [*_drawn(pictures, notes), paths])


def _acceptance(report: dict[str, Any], inputs: Inputs, pictures: Pictures) -> str:
    accepted, nodes = report["acceptance"], report["tree"]["nodes"]
    how = (
        f"The tree has {nodes} nodes, several of them for one place; fewer are served where they do not pay. "
    )
    how = how if nodes and accepted["served"] else ""
    drop = ""
    if accepted["chain"] and accepted["out_of_domain_chain"]:
        lost = accepted["chain"] - accepted["out_of_domain_chain"]
        drop = f" Out of domain the chain loses {lost:.2f} tokens per step."
    calibrated = inputs.tree.get("calibrated_on")
    client = show(
        report["arms"].get("medusa", {}).get("acceleration_at_client"),
        " The client saw {:.2f} per event.",
        "",
    )
    notes = {
        "by_position": f"{how}A step stops at its first wrong guess.",
        "step_sizes": "Every step commits one token of the base itself, and the guesses that it accepted."
        + client,
        "acceptance": f"Held-out prompts.{drop}",
        "tree": "A number is the rank of a head's guess, 0 its best. The darker a node, the more it is worth."
        + (f" Calibrated on {calibrated} held-out prompts." if calibrated else ""),
    }
    return section("Acceptance", _drawn(pictures, notes))


def _quality(report: dict[str, Any], inputs: Inputs, pictures: Pictures) -> str:
    served = report["acceptance"]["served"] or report["acceptance"]["chain"]
    beside = show(served, " An acceleration of {:.2f} tokens per step is no sign that they are.", "")
    dtype = report["model"].get("dtype", "dtype unknown")
    ties = (
        f" {inputs.near_ties} of the differences are near-ties of the base's own scores."
        if inputs.near_ties
        else ""
    )
    notes = {
        "parity": f"Greedy, {dtype}. Offline: medusa, baseline and transformers.{ties}",
        "quality": f"Held-out prompts.{beside}",
    }
    return section("Parity and quality", _drawn(pictures, notes))


def _training(report: dict[str, Any], pictures: Pictures) -> str:
    pairs = zip(report["heads"]["top1"], report["heads"]["top5"], strict=False)
    scores = "; ".join(f"head {head}: {top1:.0%} / {top5:.0%}" for head, (top1, top5) in enumerate(pairs, 1))
    notes = {
        "head_loss": "Cross-entropy on training batches.",
        "top1": "On training batches." + (f" Held-out top-1 / top-5: {scores}." if scores else ""),
        "top5": "On training batches.",
        "held_out": "What served replies would have had, from the heads as they were then.",
    }
    return section("Training of the heads", _drawn(pictures, notes))


# ------------------------------------------------------------------------------------------------ small print


def _origin(report: dict[str, Any], inputs: Inputs) -> str:
    """Model, hardware, versions and code revisions, and the configs behind the numbers, folded."""
    revisions = {stage: made["revision"] for stage, made in inputs.provenance.items() if made.get("revision")}
    facts = {
        "Model": report["model"],
        "Hardware": report["hardware"],
        "Versions": report["versions"],
        "Code": revisions,
    }
    lines = {
        name: ", ".join(f"{k} {v}" for k, v in values.items()) or "not recorded"
        for name, values in facts.items()
    }
    configs = {stage: made.get("config") for stage, made in inputs.provenance.items()}
    configs |= {"traffic": inputs.traffic} if inputs.traffic else {}
    details = "".join(folded(f"Config: {name}", config) for name, config in configs.items())
    return f"<h2>Where it comes from</h2>{definitions(lines)}{details}"
