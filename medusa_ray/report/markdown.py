"""report.json -> summary.md, in GitHub's Markdown: for a pull request, an issue, or the summary of a CI job."""

from typing import Any

from medusa_ray.report import text


def render(report: dict[str, Any]) -> str:
    """Verdict, tables and caveats."""
    answer, _, why = report["verdict"]["reason"].partition(": ")
    kind = "TIP" if report["verdict"]["ship"] else "CAUTION"
    parts = [
        "## Medusa report: " + _cell(report["model"].get("base", "unknown model")),
        f"> [!{kind}]\n> **{_cell(answer)}**: {_cell(why)}",
        *(f"> [!WARNING]\n> {_cell(line)}" for line in text.caveats(report)),
        table(*text.table(report, units_in="headers"), num_text=2) if report["arms"] else "",
        *(f"Break-even concurrency, {key}: {found['text']}." for key, found in report["break_even"].items()),
        _section("Predicted and measured speedup", text.predictions(report)),
        _section("At equal latency", text.at_equal_latency(report)),
        _section("By category", text.categories(report)),
        f"<sub>{_cell(text.caption(report))}. Speedup is of the time per output token, baseline over medusa; the "
        "interval is a bootstrap over prompts and rounds. Acceleration is tokens per step and no speedup.</sub>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(headers: list[str], rows: list[list[str]], num_text: int = 1) -> str:
    """A Markdown table; the first `num_text` columns are text."""
    rule = ["---" if column < num_text else "---:" for column in range(len(headers))]
    lines = [[_cell(cell) for cell in line] for line in (headers, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _section(title: str, content: text.Table) -> str:
    headers, rows = content
    return f"### {title}\n\n{table(headers, rows)}" if rows else ""


def _cell(value: Any) -> str:
    """Text that Markdown takes for nothing else, in one line."""
    escaped = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for sign in "|*_`[]":
        escaped = escaped.replace(sign, f"\\{sign}")
    return " ".join(escaped.split())
