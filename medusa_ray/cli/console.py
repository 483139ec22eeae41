"""What a report or a comparison says -> the console."""

from typing import Any

from rich.console import Console
from rich.table import Table

from medusa_ray import report as reporting


def show(report: dict[str, Any]) -> None:
    """The benchmark table, and what it comes to."""
    console = _console()
    _print_table(console, *reporting.table(report))
    for line in (reporting.caption(report), *reporting.caveats(report)):
        _print(console, line)
    _print(console, f"verdict  {report['verdict']['reason']}", style="bold")


def show_comparison(found: dict[str, Any]) -> None:
    """Both verdicts, what else differs, and every figure."""
    console = _console()
    _print_table(console, *reporting.comparison_table(found))
    for line in found["notes"]:
        _print(console, line)
    for name in ("a", "b"):
        _print(console, f"{name.upper()}  {found[name]}: {found['verdicts'][name]['reason']}", style="bold")


def _console() -> Console:
    """As wide as the terminal; piped, as wide as the tables are."""
    console = Console()
    return console if console.is_terminal else Console(width=220)


def _print_table(console: Console, headers: list[str], rows: list[list[str]]) -> None:
    grid = Table(*headers)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def _print(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
