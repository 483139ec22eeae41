"""Figures and pictures -> report.html: one file that opens without a network and needs no script.

Whatever comes from data (names, errors, configs) is escaped here, at the one place where it becomes HTML.
"""

import html
import json
from typing import Any

from medusa_ray.report import pictures
from medusa_ray.report.summary import Inputs
from medusa_ray.report.text import caption, caveats, show, table
from medusa_ray.report.verdict import MAX_ERROR_DIFFERENCE, MAX_TOKENS_DIFFERENCE, MAX_TTFT_RATIO, MIN_SPEEDUP

STYLE = """
:root { --ink: #1c2733; --quiet: #5b6673; --rule: #d9dee4; --pale: #f5f7f9;
  --good: #1a6e3c; --bad: #b3261e; --open: #7a5b00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 28px 32px 64px; color: var(--ink); background: #fff;
  font: 15px/1.5 "Segoe UI", "Helvetica Neue", Helvetica, Arial, "Liberation Sans", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { font-size: 22px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 4px; padding-top: 18px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 6px 0; }
.quiet, figcaption { color: var(--quiet); font-size: 13px; line-height: 1.45; }
.verdict { margin: 20px 0; padding: 18px 22px; border-radius: 6px; color: #fff; background: var(--open); }
.verdict.ship { background: var(--good); }
.verdict.no { background: var(--bad); }
.verdict strong { display: block; font-size: 28px; line-height: 1.2; margin-bottom: 6px; }
.verdict p { margin: 0; max-width: 100ch; }
.tiles { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 12px; }
.tile { background: var(--pale); border-radius: 6px; padding: 12px 14px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; }
.tile span { display: block; font-size: 13px; line-height: 1.4; color: var(--quiet); }
.tile span:first-child { color: var(--ink); font-weight: 600; }
.caveat { margin: 14px 0; padding: 10px 16px; border-left: 4px solid var(--bad); background: #fbeeed; }
.scroll { overflow-x: auto; margin: 12px 0 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: right; vertical-align: bottom; font-size: 12.5px; line-height: 1.3; color: var(--quiet);
  font-weight: 600; border-bottom: 1.5px solid var(--ink); padding: 4px 8px; }
td { text-align: right; padding: 5px 8px; white-space: nowrap; }
th.text, td.text { text-align: left; }
tr.group td { border-top: 1px solid var(--rule); }
tr.medusa td { background: #eef4fa; font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr));
  gap: 30px 36px; margin-top: 16px; }
figure { margin: 0; max-width: 640px; break-inside: avoid; }
figure:has(.wide) { grid-column: 1 / -1; max-width: none; }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; margin: 6px 0; }
.big { font-size: 40px; font-weight: 700; line-height: 1.2; }
.bar { height: 12px; border-radius: 3px; background: var(--bad); overflow: hidden; margin: 8px 0; }
.bar i { display: block; height: 100%; background: var(--good); }
dl { display: grid; grid-template-columns: minmax(130px, 190px) 1fr; gap: 6px 18px; font-size: 14px; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0; max-width: 90ch; overflow-wrap: anywhere; }
pre { background: var(--pale); padding: 12px 14px; border-radius: 6px; font-size: 12px; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin: 8px 0; }
@media (max-width: 1000px) {
  .tiles { grid-template-columns: repeat(3, 1fr); }
  table { font-size: 12.5px; } th { font-size: 12px; } th, td { padding: 4px 5px; }
}
@media (max-width: 640px) {
  body { padding: 18px 16px 40px; } .tiles { grid-template-columns: repeat(2, 1fr); }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 12px; } h2 { break-after: avoid; margin-top: 24px; }
  .scroll { overflow: visible; } table { font-size: 9.5px; } th { font-size: 9px; }
  th, td { padding: 3px 4px; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 18px 20px; }
}
"""

DEFINITIONS = {
    "Acceleration": (
        "Tokens per step: (steps + accepted guesses) / steps, over all good requests. It counts steps, not "
        "seconds. A published Medusa benchmark (Llama 3.1 8B, text-to-SQL, TGI) had an acceleration of "
        "(17,687 + 27,101) / 27,101 = 1.65, while its wall clock went from 15.56 to 18.53 tokens/s for one "
        "request at a time, which is 1.19x, and from 79.66 to 84.42 tokens/s under full load, which is 1.06x."
    ),
    "Speedup": (
        "Wall clock, baseline over medusa at the same load, so more is better. Of the time per output token: "
        "ratio of the medians over all (round, prompt) pairs that both arms answered; its 95% interval is a "
        "seeded bootstrap over prompts, each with all its rounds. Of output tokens per second: ratio of the "
        "two rates."
    ),
    "Time per output token": (
        "TPOT = (latency - time to first token) / (output tokens - 1) of each request; the median over "
        "requests. A reply of one token has none."
    ),
    "Inter token latency": (
        "GuideLLM's mean, as in its table: sum of (latency - time to first token) over sum of (output tokens "
        "- 1), so long replies weigh more than in the TPOT. It is no gap between stream events: one event of "
        "Medusa carries all tokens of its step."
    ),
    "Time to first token": "From sending a request to its first content; the median over requests.",
    "Request latency": "From sending a request to its last byte; the median over requests.",
    "Rates": (
        "Requests and output tokens per second: those of completed requests over the wall window of a round, "
        "first send to last byte; the median over rounds."
    ),
    "p99": "99th percentile over the requests of all rounds.",
    "Requests": (
        "Sent after warm-up, failures included. A failed request counts as a failure and in no time."
    ),
    "Acceptance by position": (
        "Share of steps that accepted at least that many guesses. A head alone is scored on held-out "
        "replies, whatever the heads before it guessed."
    ),
    "In and out of domain": (
        "Tokens per step on held-out prompts of the training domain, and on prompts unlike anything in "
        "training. Prompts that shaped the tree are not among those that score it."
    ),
    "Parity": "Prompts with the same greedy output, token for token, from medusa, baseline and transformers.",
    "Exact match": (
        "Share of the base's greedy answers that equal the reference text; where answers can be executed, "
        "also the share whose result equals the reference's. Heads change neither."
    ),
    "Verdict": (
        "Ship up to the highest concurrency such that it and all lower ones have a lower bound of the "
        f"speedup above {MIN_SPEEDUP:.2f}, a time to first token at most {MAX_TTFT_RATIO - 1:.0%} longer or "
        "within noise, and a p99 of the time per output token that is not worse beyond noise; and parity on "
        "every prompt. A run whose arms got other prompts, whose error rates are more than "
        f"{MAX_ERROR_DIFFERENCE:.1%} apart, or whose greedy token totals differ by more than "
        f"{MAX_TOKENS_DIFFERENCE:.0%}, is not comparable and never ships."
    ),
}


def render(report: dict[str, Any], inputs: Inputs) -> str:
    """The whole page."""
    title = f"Medusa report: {report['model'].get('base', 'unknown model')}"
    sections = [
        _head(report, title),
        _tiles(report),
        *[f'<p class="caveat">{_text(line)}</p>' for line in caveats(report)],
        _absent(report, inputs),
        _benchmark(report, inputs),
        _speed(report, inputs),
        _acceptance(report, inputs),
        _quality(report, inputs),
        _training(report, inputs),
        "<h2>What each number means</h2>",
        _list(DEFINITIONS),
        _origin(report, inputs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _head(report: dict[str, Any], title: str) -> str:
    answer, _, why = report["verdict"]["reason"].partition(": ")
    why = why[:1].upper() + why[1:]
    kind = "ship" if report["verdict"]["ship"] else "no" if answer == "Do not ship" else "open"
    return (
        f'<header><h1>{_text(title)}</h1><p class="quiet">{_text(caption(report))}</p></header>\n'
        f'<div class="verdict {kind}"><strong>{_text(answer)}</strong><p>{_text(why)}</p></div>'
    )


# ------------------------------------------------------------------------------------------------ key numbers


def _tiles(report: dict[str, Any]) -> str:
    tiles = [*_speed_tiles(report), *_other_tiles(report)]
    cells = (
        f"<span>{_text(name)}</span><b>{_text(value)}</b><span>{_text(note)}</span>"
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
    for load in loads[:1]:
        before, after = (report["arms"][arm]["load"][load]["ttft_ms"] for arm in ("baseline", "medusa"))
        if before and after:
            note = f"{before:.1f} to {after:.1f} ms, {load}"
            tiles.append(("Time to first token", f"{after / before - 1:+.0%}", note))
    return tiles


def _other_tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and note of: parity, quality."""
    parity, quality, tiles = report["parity"], report["quality"], []
    if parity["prompts"]:
        tiles.append(("Same text", "{token_exact} / {prompts}".format(**parity), "prompts, token for token"))
    if quality["exact_match"] is not None:
        ran = show(quality["execution_accuracy"], "; {:.1%} run to the same result", "")
        tiles.append(("Exact match", f"{quality['exact_match']:.1%}", f"of the base's answers{ran}"))
    return tiles


def _absent(report: dict[str, Any], inputs: Inputs) -> str:
    """One sentence that names what the run did not measure, so that nobody takes a gap for a good result."""
    parts = {
        "speed of both arms": report["speedup"],
        "parity": report["parity"]["prompts"],
        "exact match": report["quality"]["exact_match"] is not None,
        "execution accuracy": report["quality"]["execution_accuracy"] is not None,
        "accuracy of the heads": report["heads"]["top1"],
        "acceptance out of domain": report["acceptance"]["out_of_domain_chain"],
        "speed in process": report["engine"]["speedup"],
        "training curves": inputs.training,
    }
    absent = [name for name, found in parts.items() if not found]
    return f'<p class="quiet">Not measured in this run: {_text(", ".join(absent))}.</p>' if absent else ""


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
    traffic = inputs.bench.get("traffic", {})
    told = ", ".join(
        [*(form.format(traffic[key]) for key, form in forms.items() if key in traffic), "medians"]
    )
    headers, rows = table(report, units_in="headers")
    note = f'<p class="quiet">{_text(caption(report))}<br>Traffic: {_text(told)}. Rules are at the end.</p>'
    return "<h2>Benchmark</h2>" + _table(headers, rows, num_text=2) + note


def _table(headers: list[str], rows: list[list[str]], num_text: int) -> str:
    """An HTML table; the first `num_text` columns are text. Rows that begin alike are one group."""

    def line(tag: str, cells: list[str]) -> str:
        classes = [' class="text"'] * num_text + [""] * (len(cells) - num_text)
        return "".join(
            f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True)
        )

    body, last = "", None
    for row in rows:
        kind = ("group " if row[0] != last else "") + ("medusa" if "medusa" in row[:num_text] else "")
        body += f'<tr class="{kind}">{line("td", ["" if row[0] == last else row[0], *row[1:]])}</tr>'
        last = row[0]
    head = f"<thead><tr>{line('th', headers)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


# ------------------------------------------------------------------------------------------------ pictures


def _section(title: str, *figures: str) -> str:
    shown = "".join(figures)
    return f'<h2>{_text(title)}</h2><div class="pictures">{shown}</div>' if shown else ""


def _figure(title: str, content: str | None, note: str) -> str:
    if not content:
        return ""
    return f"<figure><h3>{_text(title)}</h3>{content}<figcaption>{_text(note)}</figcaption></figure>"


def _speed(report: dict[str, Any], inputs: Inputs) -> str:
    counts = {load["requests"] for arm in report["arms"].values() for load in arm["load"].values()}
    many = "n = " + " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else ""
    beside = show(report["acceptance"]["served"], "; the acceleration is {:.2f} tokens per step", "")
    mode, threads = (report["model"].get(key) for key in ("engine_mode", "engine_threads"))
    ran = ", ".join([str(mode or "mode unknown"), *([f"threads: {threads}"] if threads else [])])
    ratio = show(report["engine"]["speedup"], " Medusa over our baseline: {:.2f}x.", "")
    return _section(
        "Speed",
        _figure(
            "Speedup by load",
            pictures.speedup(report, MIN_SPEEDUP),
            "Circles: time per output token, with its 95% interval. Diamonds: output tokens per second. "
            f"{many} requests per arm and load{beside}.",
        ),
        _figure(
            "Time per output token",
            pictures.token_time(report),
            f"Bars to the median, thin lines to the p99. {many} requests per arm and load.",
        ),
        _figure(
            "In process, without a server",
            pictures.engine(report),
            f"Our engine with and without heads runs in the same way ({ran}).{ratio}",
        ),
        _figure(
            "What the HTTP path costs",
            _serve_paths(inputs),
            "The same engine behind each of Ray Serve's HTTP paths.",
        ),
    )


def _serve_paths(inputs: Inputs) -> str | None:
    paths = inputs.bench.get("serve_paths")
    if not paths:
        return None
    columns = list(dict.fromkeys(key for figures in paths.values() for key in figures))
    rows = [[path, *(_plain(figures.get(key)) for key in columns)] for path, figures in paths.items()]
    return _table(["Path", *columns], rows, num_text=1)


def _plain(value: Any) -> str:
    return show(value, "{:.3g}" if isinstance(value, float) else "{}")


def _acceptance(report: dict[str, Any], inputs: Inputs) -> str:
    accepted, nodes = report["acceptance"], report["tree"]["nodes"]
    how = f"The tree has {nodes} nodes, several of them for one place; fewer are served where they do not pay. "
    how = how if nodes else ""
    drop = ""
    if accepted["chain"] and accepted["out_of_domain_chain"]:
        lost = accepted["chain"] - accepted["out_of_domain_chain"]
        drop = f" Out of domain the chain loses {lost:.2f} tokens per step."
    calibrated = inputs.tree.get("calibrated_on")
    return _section(
        "Acceptance",
        _figure(
            "Acceptance by position",
            pictures.by_position(report),
            f"{how if accepted['served'] else ''}A step stops at its first wrong guess.",
        ),
        _figure(
            "Tokens per step",
            pictures.step_sizes(report),
            "Every step commits one token of the base itself, and the guesses that it accepted.",
        ),
        _figure("In domain and out of domain", pictures.acceptance(report), f"Held-out prompts.{drop}"),
        _figure(
            "Token tree",
            pictures.tree(report["tree"]["paths"]),
            "A number is the rank of a head's guess, 0 its best. The darker a node, the more it is worth."
            + (f" Calibrated on {calibrated} held-out prompts." if calibrated else ""),
        ),
    )


def _quality(report: dict[str, Any], inputs: Inputs) -> str:
    served = report["acceptance"]["served"] or report["acceptance"]["chain"]
    beside = show(served, " An acceleration of {:.2f} tokens per step is no sign that they are.", "")
    dtype = report["model"].get("dtype", "dtype unknown")
    return _section(
        "Parity and quality",
        _figure(
            "Is the text the same?",
            _parity(report),
            f"Greedy, {dtype}: medusa, baseline and transformers, token for token."
            + (
                f" {inputs.near_ties} of the differences are near-ties of the base's own scores."
                if inputs.near_ties
                else ""
            ),
        ),
        _figure("Are the answers right?", pictures.quality(report), f"Held-out prompts.{beside}"),
    )


def _parity(report: dict[str, Any]) -> str | None:
    prompts, exact = report["parity"]["prompts"], report["parity"]["token_exact"]
    if not prompts:
        return None
    return (
        f'<div class="big">{exact} of {prompts}</div><div class="bar" role="img" '
        f'aria-label="{exact / prompts:.1%} the same"><i style="width:{exact / prompts:.2%}"></i></div>'
    )


def _training(report: dict[str, Any], inputs: Inputs) -> str:
    pairs = zip(report["heads"]["top1"], report["heads"]["top5"], strict=False)
    scores = "; ".join(f"head {head}: {top1:.0%} / {top5:.0%}" for head, (top1, top5) in enumerate(pairs, 1))
    return _section(
        "Training of the heads",
        _figure(
            "Loss",
            pictures.curves(inputs.training, "head_loss", "Loss"),
            "Cross-entropy on training batches.",
        ),
        _figure(
            "Top-1 accuracy",
            pictures.curves(inputs.training, "top1", "Top-1 accuracy"),
            "On training batches." + (f" Held-out top-1 / top-5: {scores}." if scores else ""),
        ),
    )


# ------------------------------------------------------------------------------------------------ small print


def _list(values: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in values.items()) + "</dl>"


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
    configs |= {"traffic": inputs.bench["traffic"]} if "traffic" in inputs.bench else {}
    texts = {name: _text(json.dumps(config, indent=2)) for name, config in configs.items()}
    details = "".join(
        f"<details><summary>Config: {_text(name)}</summary><pre>{text}</pre></details>"
        for name, text in texts.items()
    )
    return f"<h2>Where it comes from</h2>{_list(lines)}{details}"
