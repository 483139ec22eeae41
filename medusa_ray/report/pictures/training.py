"""heads/training.jsonl and what answers are worth -> pictures. Each is None when the run lacks what it would show."""

from typing import Any

from medusa_ray.report.drawing import (
    HEADS,
    LOSS,
    MEDUSA,
    RULE,
    Picture,
    apart,
    at_right,
    drawing,
    shares_across,
)

CURVES = {"head_loss": "Loss", "top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}


def curves(training: list[dict[str, Any]], key: str) -> Picture | None:
    """One measure of each head, a key of CURVES, over the optimizer steps."""
    lines = [line for line in training if line.get(key)]
    if len(lines) < 2:
        return None
    ends, title = lines[-1][key], CURVES[key]
    label = f"{title} by optimizer step. At the end: " + "; ".join(
        f"head {h}: {y:.2f}" for h, y in enumerate(ends, 1)
    )
    columns = {"step": [line["step"] for line in lines]}
    columns |= {f"head_{head + 1}": [line[key][head] for line in lines] for head in range(len(ends))}
    with drawing(key, title, label, columns, height=2.4) as picture:
        ax = picture.axes
        for head in range(len(ends)):
            ax.plot(
                columns["step"], columns[f"head_{head + 1}"], color=HEADS[head % len(HEADS)], linewidth=1.6
            )
        ax.set_ylim(bottom=0)
        for head, y in enumerate(apart(ends, 0.09 * ax.get_ylim()[1])):
            at_right(ax, f"head {head + 1}: {ends[head]:.2f}", y, HEADS[head % len(HEADS)])
        ax.margins(x=0)
        ax.set_xlabel("optimizer step")
    return picture


def held_out(training: list[dict[str, Any]]) -> Picture | None:
    """Tokens per step on held-out rows, by optimizer step: the chain, and a tree where one was scored."""
    lines = [line for line in training if (line.get("held_out") or {}).get("tokens_per_step")]
    if len(lines) < 2:
        return None
    names = list(lines[-1]["held_out"]["tokens_per_step"])
    columns = {"step": [line["step"] for line in lines]}
    columns |= {name: [line["held_out"]["tokens_per_step"].get(name) for line in lines] for name in names}
    ends = [columns[name][-1] for name in names]
    label = "Tokens per step on held-out rows. At the end: " + "; ".join(
        f"{name}: {end:.2f}" for name, end in zip(names, ends, strict=True)
    )
    with drawing("held_out", "Tokens per step, held out", label, columns, height=2.4) as picture:
        ax = picture.axes
        for index, name in enumerate(names):
            ax.plot(columns["step"], columns[name], "o-", color=HEADS[index % len(HEADS)], markersize=4)
        ax.set_ylim(1, 1.1 * max(ends))
        for index, y in enumerate(apart(ends, 0.09 * (1.1 * max(ends) - 1))):
            at_right(
                ax, f"{names[index].replace('_', ' of ')}: {ends[index]:.2f}", y, HEADS[index % len(HEADS)]
            )
        ax.margins(x=0)
        ax.set_xlabel("optimizer step")
    return picture


def quality(report: dict[str, Any]) -> Picture | None:
    """How often the base's answers are right."""
    names = {"exact_match": "exact match", "execution_accuracy": "runs to the same result"}
    shown = {
        text: report["quality"][key] for key, text in names.items() if report["quality"][key] is not None
    }
    if not shown:
        return None
    label = "Quality of the base. " + "; ".join(f"{text}: {share:.0%}" for text, share in shown.items())
    columns = {"measure": list(shown), "share": list(shown.values())}
    with drawing(
        "quality", "Are the answers right?", label, columns, height=0.5 + 0.45 * len(shown)
    ) as picture:
        lines = [(text, share, f"{share:.1%}") for text, share in shown.items()]
        shares_across(picture.axes, lines, MEDUSA if min(shown.values()) >= 0.5 else LOSS, RULE)
    return picture


def parity(report: dict[str, Any]) -> Picture | None:
    """How many prompts have the same text from both arms, offline and as served."""
    offline, served = report["parity"], report["parity"]["served"]
    counted = (
        ("offline, token for token", offline["token_exact"], offline["prompts"]),
        ("as served, the text", served["equal"], served["prompts"]),
    )
    shown = [(text, same, prompts) for text, same, prompts in counted if prompts]
    if not shown:
        return None
    label = "The same text. " + "; ".join(
        f"{text}: {same} of {prompts} prompts" for text, same, prompts in shown
    )
    names = ("where", "same", "prompts")
    columns = dict(zip(names, map(list, zip(*shown, strict=True)), strict=True))
    with drawing(
        "parity", "Is the text the same?", label, columns, height=0.5 + 0.45 * len(shown)
    ) as picture:
        lines = [(text, same / prompts, f"{same} of {prompts}") for text, same, prompts in shown]
        shares_across(picture.axes, lines, MEDUSA, LOSS)
    return picture
