"""A diagnosis -> the console."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

STYLES = {"fault": "bold red", "warning": "yellow", "ok": "green"}


def show(diagnosis: dict[str, Any], console: Console | None = None) -> None:
    """A line for what is well; for the rest what was found, what was expected and what to do."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=80)
    grid = Table("", "Check", Column("Found", overflow="fold"))  # a long path is not cut
    for finding in diagnosis["findings"]:
        level = finding["level"]
        text = Text(f"{finding['node']}: " if finding["node"] else "", style="bold")
        text.append(finding["found"], style="not bold")
        for word, key in (("expected", "expected"), ("do", "do")):
            if finding[key]:
                text.append(f"\n{word}: ", style="not bold dim").append(finding[key], style="not bold")
        grid.add_row(Text(level, style=STYLES[level]), Text(finding["check"]), text)
    console.print(grid)
    levels = [finding["level"] for finding in diagnosis["findings"]]
    faults, warnings = levels.count("fault"), levels.count("warning")
    console.print(
        f"{'fit' if diagnosis['is_fit'] else 'not fit'}: {faults} fault(s), {warnings} warning(s), "
        f"{len(diagnosis['nodes'])} node(s), {diagnosis['seconds']} s",
        style="bold",
        highlight=False,
    )
