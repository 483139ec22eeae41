"""What a stage logs -> a live line on a terminal, JSON lines on a pipe; on stderr, so stdout is for results."""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

INTERVAL_S = 10.0  # between two JSON lines


@contextmanager
def step(name: str, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Shows that a step runs, what it logs and how long it takes; its figures are filled in meanwhile.

    On a terminal that is one live line; piped, a JSON line per INTERVAL_S. A quiet step ends without a word.
    """
    started = time.monotonic()
    console = Console(stderr=True)
    latest = Latest(console, name)
    logger = logging.getLogger("medusa_ray")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(latest)
    facts: dict[str, Any] = {}
    show = live_line if console.is_terminal else json_lines
    try:
        with show(console, name, latest, started):
            yield facts
    finally:
        logger.removeHandler(latest)
    seconds = round(time.monotonic() - started, 1)
    if quiet:
        return
    if console.is_terminal:
        text = " ".join(f"{key}={value}" for key, value in facts.items())
        console.print(f"[green]✓[/] {name:<9} {seconds:6.1f} s  ", end="")
        console.print(text, highlight=False, markup=False, overflow="ellipsis", no_wrap=True)
    else:
        print_json({**facts, "stage": name, "state": "done", "seconds": seconds})


class Latest(logging.Handler):
    """Keeps the newest `key=value` fields that a stage logged; a warning is shown at once."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(logging.INFO)
        self.console, self.name = console, name
        self.fields: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno < logging.WARNING:
            self.fields = dict(re.findall(r"([\w.]+)=(\S+)", message)) or {"message": message}
        elif self.console.is_terminal:
            self.console.print(message, highlight=False, markup=False)
        else:
            print_json({"stage": self.name, "state": "warning", "message": message})


@contextmanager
def live_line(console: Console, name: str, latest: Latest, started: float) -> Iterator[None]:
    columns = (
        SpinnerColumn(),
        TextColumn(name),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        task = progress.add_task(name, total=None, text="")
        with repeating(
            0.5, lambda: progress.update(task, text=" ".join(f"{k}={v}" for k, v in latest.fields.items()))
        ):
            yield


@contextmanager
def json_lines(console: Console, name: str, latest: Latest, started: float) -> Iterator[None]:
    def line() -> None:
        fields = {key: value_of(text) for key, text in latest.fields.items()}
        print_json(
            {**fields, "stage": name, "state": "running", "seconds": round(time.monotonic() - started, 1)}
        )

    with repeating(INTERVAL_S, line):
        yield


def value_of(text: str) -> Any:
    """What a logged value stands for: a number where it is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def print_json(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), file=sys.stderr, flush=True)


@contextmanager
def repeating(interval_s: float, action: Callable[[], None]) -> Iterator[None]:
    """Does something again and again in a thread until the block ends."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(interval_s):
            action()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
