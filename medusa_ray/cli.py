"""The door: one verb per stage. A user's mistake ends with exit code 2 and one message, a bug with its traceback.

Stages are imported when their verb runs, so `--help` answers at once and `validate` needs neither torch nor ray.
"""

import importlib
import json
import logging
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from medusa_ray.config import RunConfig

STAGES = ("data", "distill", "hidden", "train", "evaluate")
INTERVAL_S = 10.0  # between two JSON lines when nobody watches

app = typer.Typer(
    name="medusa-ray",
    help="Medusa heads on Ray: self-distil, train, serve and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Words that start with a dash go to the overrides, where flags of the original script are recognised.
LENIENT = {"ignore_unknown_options": True}
RunFile = Annotated[str, typer.Argument(help="YAML of the run: a path or a URI.", metavar="RUN.YAML", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the file's.", metavar="[KEY=VALUE]...", show_default=False)
]


def main() -> None:
    """The command `medusa-ray`."""
    try:
        app()
    except ValueError as error:
        from medusa_ray.config import UserError

        # What fails inside Ray comes back as an error of both classes, with the original as its cause.
        cause = getattr(error, "cause", error)
        if not isinstance(cause, UserError):
            raise
        print(f"medusa-ray: {cause}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------ verbs


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder that takes everything.")] = Path("medusa-demo"),
    data: Annotated[str | None, typer.Option(help="Your own chats instead of the generated ones.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Smaller everything, still all eight steps.")] = False,
    train_base: Annotated[
        str | None, typer.Option(help="Train a base of this size on the spot, 0.9m for one.", metavar="SIZE")
    ] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port of the servers; a free one is taken by default.")] = None,
) -> None:
    """The whole path on the embedded text-to-SQL task; goes on where it stopped."""
    from medusa_ray.demo import pipeline

    pipeline.run(out, data=data, fast=fast, train_base=train_base, port=port)


@app.command()
def validate(files: Annotated[list[str], typer.Argument(help="Run, serve or traffic YAML.", metavar="FILE...")]) -> None:
    """Check run, serve and traffic files; misspelt keys are named with the nearest right one."""
    from medusa_ray import config

    problems = []
    for file in files:
        try:
            raw = config.read(file)
            kind = config.kind_of(raw)
            config.parse(kind, raw, file)
            print(f"{file}: a valid {kind.__name__}")
        except config.UserError as error:
            problems.append(str(error))
    if problems:
        raise config.UserError("\n".join(["invalid", *problems]))


@app.command(context_settings=LENIENT)
def plan(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Show the resolved config, parameters, memory, disk, rows and steps of a run; runs nothing."""
    import yaml

    from medusa_ray import config

    run_config = config.load(config.RunConfig, run_yaml, overrides or ())
    print(yaml.safe_dump(run_config.model_dump(), sort_keys=False))
    for name, value in estimate(run_config):
        print(f"{name:<32} {value}")


@app.command(context_settings=LENIENT)
def data(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Chats from anywhere -> prompt rows."""
    run_stages(("data",), run_yaml, overrides)


@app.command(context_settings=LENIENT)
def distill(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Prompts -> what the base itself answers, as token ids, with hidden states where asked."""
    run_stages(("distill",), run_yaml, overrides)


@app.command(context_settings=LENIENT)
def hidden(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Distilled replies -> hidden states of the frozen base."""
    run_stages(("hidden",), run_yaml, overrides)


@app.command(context_settings=LENIENT)
def train(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Hidden states -> heads."""
    run_stages(("train",), run_yaml, overrides)


@app.command(context_settings=LENIENT)
def evaluate(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Heads -> accuracy and acceptance on held-out prompts, and a calibrated tree."""
    run_stages(("evaluate",), run_yaml, overrides)


@app.command(context_settings=LENIENT)
def run(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """data, distill, hidden, train and evaluate in order, skipping what is complete."""
    run_stages(STAGES, run_yaml, overrides)


@app.command()
def serve(serve_yaml: Annotated[str, typer.Argument(metavar="SERVE.YAML", show_default=False)]) -> None:
    """Deploy the applications of a file on the cluster found, or on a local one until Ctrl-C."""
    from medusa_ray import config

    serve_config = config.load(config.ServeConfig, serve_yaml)
    prepare_ray()
    from medusa_ray import serve as stage

    is_local = not os.environ.get("RAY_ADDRESS")
    if is_local:
        os.environ.update(stage.environment())
    with cluster():
        with step("serve"):
            urls = stage.deploy(serve_config)
        for application in serve_config.applications:
            print(f"{application.args.model_id}: {urls[application.name]}/v1", flush=True)
        if is_local:
            print("Ctrl-C ends the servers.", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                stage.shutdown()


@app.command()
def bench(traffic_yaml: Annotated[str, typer.Argument(metavar="TRAFFIC.YAML", show_default=False)]) -> None:
    """Send the same traffic to each target, interleaved, and keep a row per request."""
    from medusa_ray import config

    traffic = config.load(config.TrafficConfig, traffic_yaml)
    check_writable(traffic.output)
    with step("bench") as facts:
        from medusa_ray import bench as stage

        facts.update(figures(stage.run(traffic)))


@app.command()
def report(folder: Annotated[str, typer.Argument(metavar="DIR", help="Output folder of a run.")]) -> None:
    """Results of a run -> report.json, report.html and the console table."""
    from medusa_ray import report as stage

    with step("report"):
        written = stage.run(folder)
    Console().print(stage.table(written))


# ------------------------------------------------------------------------------------------------------ planning


def estimate(run: "RunConfig") -> list[tuple[str, str]]:
    """What a run will take, by name. Bounds assume replies as long as distill.max_new_tokens allows."""
    num_rows = count_rows(run.data.train)
    num_rows = min(filter(None, (num_rows, run.data.num_train)), default=None)
    # A reply of R tokens trains the heads at R - 1 positions (records.HIDDEN).
    num_positions = num_rows and num_rows * (run.distill.max_new_tokens - 1)
    train = run.train
    positions_per_step = train.batch_size * train.gradient_accumulation_steps * train.num_workers
    lines = [
        ("training rows", f"{num_rows:,}" if num_rows else f"unknown: {run.data.train} cannot be counted cheaply"),
        ("positions in a training step", f"{positions_per_step:,}"),
    ]
    if num_positions:
        num_steps = train.epochs * math.ceil(num_positions / positions_per_step)
        lines.append(("optimizer steps", f"at most {num_steps:,}"))
    base = read_base_config(run)
    if base is None:
        return [*lines, ("sizes", f"unknown: the config.json of {run.model.base} is neither on disk nor on a hub in reach")]

    base_bytes = 2 if run.model.dtype == "bfloat16" else 4
    hidden_size, vocab_size = base["hidden_size"], base["vocab_size"]
    num_attention_heads = base["num_attention_heads"]
    num_kv_heads = base.get("num_key_value_heads") or num_attention_heads
    head_dim = base.get("head_dim") or hidden_size // num_attention_heads
    num_layers = base["num_hidden_layers"]
    num_embeddings = 1 if base.get("tie_word_embeddings") else 2
    base_size = num_embeddings * vocab_size * hidden_size + hidden_size
    base_size += num_layers * 2 * hidden_size * (head_dim * (num_attention_heads + num_kv_heads) + 1)
    base_size += num_layers * 3 * hidden_size * base["intermediate_size"]
    head_size = run.heads.num_layers * hidden_size * (hidden_size + 1)
    head_size += vocab_size * hidden_size if run.heads.layout == "own" else 0
    heads_size = run.heads.num_heads * head_size

    num_tokens = run.distill.batch_size * (run.data.max_prompt_tokens + run.distill.max_new_tokens)
    cache = num_tokens * num_layers * num_kv_heads * head_dim * 2 * base_bytes
    # bf16: weights and gradients of 2 bytes, fp32 weights and two moments of 4; fp32: everything once, of 4.
    weights, optimizer = (4, 12) if train.dtype == "bfloat16" else (8, 8)
    head_bytes = weights + optimizer / (train.num_workers if train.zero_stage else 1)
    logits = train.batch_size * run.heads.num_heads * vocab_size * 4 * 2  # fp32, and their gradient
    shared = vocab_size * hidden_size * base_bytes if run.heads.layout == "shared" else 0
    lines += [
        ("parameters of the base", f"{base_size / 1e6:,.1f} M"),
        ("parameters of the heads", f"{heads_size / 1e6:,.1f} M"),
        ("memory of a distill actor", f"{size(base_size * base_bytes)} of weights, at most {size(cache)} of cache"),
        ("memory of a train worker", size(heads_size * head_bytes + shared + logits)),
        ("heads/ on disk", size(heads_size * (2 if train.dtype == "bfloat16" else 4))),
    ]
    if num_positions:
        row_bytes = num_positions * hidden_size * base_bytes
        lines.append(("hidden/ on disk", f"at most {size(row_bytes)}"))
    return lines


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def read_base_config(run: "RunConfig") -> dict[str, Any] | None:
    """config.json of the base, from its folder or the hub; None when it is out of reach or not Llama-shaped."""
    path = Path(run.model.base) / "config.json"
    if not path.exists():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(run.model.base, "config.json", revision=run.model.revision))
        except (OSError, ValueError):  # no such repository, no network, no valid name
            return None
    base = json.loads(path.read_text(encoding="utf-8"))
    base = base.get("text_config", base)
    needed = {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    return base if needed <= base.keys() else None


def count_rows(uri: str) -> int | None:
    """Chats in a local file or in a folder's train file; None where counting means to read far more than lines."""
    path = Path(uri)
    if path.is_dir():
        path = next(iter(sorted(path.glob("train.*"))), path)
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    with path.open("rb") as file:
        if path.suffix == ".json":
            return len(json.load(file))
        return sum(bool(line.strip()) for line in file)


# ------------------------------------------------------------------------------------------------------ running


def run_stages(names: tuple[str, ...], run_yaml: str, overrides: list[str] | None) -> None:
    """Runs stages of one file in order, inside one Ray cluster."""
    from medusa_ray import config

    run_config = config.load(config.RunConfig, run_yaml, overrides or ())
    check_writable(run_config.output)
    with cluster():
        for name in names:
            run_stage(name, run_config)


def run_stage(name: str, run_config: "RunConfig") -> None:
    with step(name) as facts:
        facts.update(figures(importlib.import_module(f"medusa_ray.{name}").run(run_config)))


def figures(artifact: str) -> dict[str, Any]:
    """The figures in an artifact's provenance, beside what every provenance has; `rows.good` for one inside another."""
    from medusa_ray import provenance

    common = ("key", "written", "command", "config", "inputs", "revision", "versions")
    facts: dict[str, Any] = {}
    for key, value in (provenance.read(artifact) or {}).items():
        if key not in common:
            facts |= {f"{key}.{inner}": figure for inner, figure in value.items()} if isinstance(value, dict) else {key: value}
    return {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in facts.items()
        if isinstance(value, int | float | str)
    }


def prepare_ray() -> None:
    """Settings that Ray reads when it is first imported.

    A local cluster gets a token of its own: with none, any user of this machine could run code in it, and with Ray's
    default the token would stay in the home folder and surprise the user's next `ray start`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@contextmanager
def cluster(object_store_bytes: int | None = None) -> Iterator[None]:
    """One Ray cluster for all that runs inside: that of RAY_ADDRESS, else a local one that ends with this process.

    Raises UserError when the cluster of RAY_ADDRESS does not answer.
    """
    prepare_ray()
    with step("ray", quiet=True):
        import ray

        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address := os.environ.get("RAY_ADDRESS"):
            try:
                if ":" in address:  # Ray would wait for minutes before it found nobody there
                    host, _, port = address.rpartition("//")[2].rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address, **quiet)
            except (OSError, ValueError) as error:
                from medusa_ray.config import UserError

                raise UserError(
                    f"no Ray cluster answers at RAY_ADDRESS={address!r}: {error}. Start it, or unset RAY_ADDRESS to "
                    "run on this machine alone."
                ) from error
        else:
            # "local", since without it Ray would join whatever cluster it finds on this machine. Stages ask for a CPU
            # per actor whatever the machine has, so a small one pretends to have four.
            ray.init(
                "local",
                num_cpus=max(4, os.cpu_count() or 1),
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    try:
        yield
    finally:
        ray.shutdown()


def check_writable(folder: str) -> None:
    """Raises UserError unless files can be made in the folder. Leaves nothing behind, not even the folder."""
    import tempfile

    import fsspec

    from medusa_ray.config import UserError

    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        if "file" in filesystem.protocol:
            existing = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
            tempfile.TemporaryDirectory(dir=existing).cleanup()
        else:
            filesystem.pipe_file(f"{path}/.writable", b"")
            filesystem.rm_file(f"{path}/.writable")
    except Exception as error:  # every filesystem has errors of its own
        raise UserError(
            f"the output folder {folder} cannot be written: {error}. Choose a folder that you may write to."
        ) from error


def check_port(host: str, port: int) -> None:
    """Raises UserError when something listens there already."""
    from medusa_ray.config import UserError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} of {host} cannot be used: {error.strerror}. Choose another one.") from error


# ------------------------------------------------------------------------------------------------------ progress


@contextmanager
def step(name: str, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Shows that a step runs, what it logs and how long it takes; whoever runs it fills in the figures it ends with.

    On a terminal that is one live line; piped, a JSON line per INTERVAL_S. A quiet step says nothing at its end.
    """
    started = time.monotonic()
    console = Console(stderr=True)
    latest = Latest()
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

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.fields: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            print(message, file=sys.stderr)
        self.fields = dict(re.findall(r"([\w.]+)=(\S+)", message)) or {"message": message}


@contextmanager
def live_line(console: Console, name: str, latest: Latest, started: float) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn(name), TimeElapsedColumn(), TextColumn("{task.fields[text]}", markup=False))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(name, total=None, text="")
        with repeating(0.5, lambda: progress.update(task, text=" ".join(f"{k}={v}" for k, v in latest.fields.items()))):
            yield


@contextmanager
def json_lines(console: Console, name: str, latest: Latest, started: float) -> Iterator[None]:
    def line() -> None:
        fields = {key: value_of(text) for key, text in latest.fields.items()}
        print_json({**fields, "stage": name, "state": "running", "seconds": round(time.monotonic() - started, 1)})

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
def repeating(interval_s: float, action: Any) -> Iterator[None]:
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


if __name__ == "__main__":
    main()
