"""The door: one verb per stage. A user's mistake ends with exit code 2 and a message, a bug in a traceback.

Stages are imported when their verb runs: `--help` answers at once, `validate` needs neither torch nor ray.
"""

import importlib
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from medusa_ray.cli.progress import step

if TYPE_CHECKING:
    from medusa_ray.config import RunConfig

STAGES = ("data", "distill", "hidden", "train", "evaluate")
Layout = Literal["tgi", "vllm", "trtllm", "modelopt", "fasterdecoding"]  # medusa.layouts.Format, which imports torch
SENT_BY = "MEDUSA_RAY_SENT_BY"  # in a job: the version of medusa_ray that has sent it
BaseSize = Literal["0.9m", "8m"]  # the names of demo.train_base.RECIPES, which takes seconds to import

app = typer.Typer(
    name="medusa-ray",
    help="Medusa heads on Ray: self-distil, train, serve and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Words that start with a dash go to the overrides, where flags of the original script are recognised.
LENIENT = {"ignore_unknown_options": True}
RunFile = Annotated[
    str, typer.Argument(help="YAML of the run: a path or a URI.", metavar="RUN.YAML", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the file's.", metavar="[KEY=VALUE]...", show_default=False),
]


def main() -> None:
    """The command `medusa-ray`."""
    try:
        if SENT_BY in os.environ:
            from medusa_ray.cli import jobs

            jobs.check_sender()
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
        BaseSize | None, typer.Option(help="Train a base of this size on the spot; --data implies 0.9m.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="HTTP port of the servers; a free one is taken by default.")
    ] = None,
) -> None:
    """The whole path on the embedded text-to-SQL task; goes on where it stopped."""
    from medusa_ray.demo import pipeline

    pipeline.run(out, data=data, fast=fast, train_base=train_base, port=port)


@app.command()
def validate(
    files: Annotated[
        list[str], typer.Argument(help="Run, serve or traffic YAML, or a KubeRay file.", metavar="FILE...")
    ],
) -> None:
    """Check run, serve and traffic files; misspelt keys are named with the nearest right one."""
    from medusa_ray import config

    problems = []
    for file in files:
        try:
            checked = config.parse_any(config.read(file), file)
            print(f"{file}: a valid {type(checked).__name__}")
            for note in config.notes(checked) if isinstance(checked, config.ServeConfig) else ():
                print(f"{file}: note: {note}.")
        except config.UserError as error:
            problems.append(str(error))
    if problems:
        raise config.UserError("\n".join(["invalid", *problems]))


@app.command(context_settings=LENIENT)
def plan(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Show the resolved config, parameters, memory, disk, rows and steps of a run; runs nothing."""
    import yaml

    from medusa_ray import config
    from medusa_ray.cli.estimate import estimate

    run_config = config.load(config.RunConfig, run_yaml, overrides or ())
    print(yaml.safe_dump(run_config.model_dump(), sort_keys=False))
    for name, value in estimate(run_config):
        print(f"{name:<32} {value}")


@app.command(context_settings=LENIENT)
def data(run_yaml: RunFile, overrides: Overrides = None) -> None:
    """Chats from anywhere -> prompt rows."""
    run_stages(("data",), run_yaml, overrides)


@app.command("export-prompts", context_settings=LENIENT)
def export_prompts(
    run_yaml: RunFile,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="train, test or out_of_domain; all by default.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder or URI; the run's export/ by default.")] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Put them into this data set of the hub, too: a private one."),
    ] = None,
) -> None:
    """Prompt rows -> JSON lines of text and messages for load generators, the generation prompt included."""
    from medusa_ray import config
    from medusa_ray.data import export

    run_config = config.load(config.RunConfig, run_yaml, overrides or ())
    with step("export-prompts") as facts:
        facts.update(export.run(run_config, split, out))
    if push:
        from huggingface_hub import HfApi

        from medusa_ray import hub

        commit = hub.push_prompts(out or run_config.artifact("export"), push, HfApi())
        print(f"sent as datasets/{push}@{commit}")


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
    from medusa_ray.cli.cluster import cluster, prepare_ray

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
            for model in application.engines.values():
                print(f"{model.model_id}: {urls[application.name]}/v1", flush=True)
        if is_local:
            print("Ctrl-C ends the servers.", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                stage.shutdown()


@app.command(context_settings=LENIENT)
def bench(
    traffic_yaml: Annotated[str, typer.Argument(metavar="TRAFFIC.YAML", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Send the same traffic to each target, interleaved, and keep a row per request."""
    from medusa_ray import config
    from medusa_ray.bench import blog
    from medusa_ray.cli.cluster import check_writable

    words = [traffic_yaml, *(overrides or ())]
    if blog.is_old_line(words):
        raise config.UserError(blog.answer(words))
    traffic = config.load(config.TrafficConfig, traffic_yaml, overrides or ())
    check_writable(traffic.output)
    with step("bench") as facts:
        from medusa_ray import bench as stage

        facts.update(figures(stage.run(traffic)))


@app.command()
def report(
    words: Annotated[
        list[str], typer.Argument(metavar="DIR | compare A B", help="Output folder of a run, or two of them.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder that takes a comparison; B/compare by default.")
    ] = None,
) -> None:
    """Results of a run -> report.json, report.html, summary.md and the console table; or two runs side by side."""
    from medusa_ray import report as stage
    from medusa_ray.cli import console

    if len(words) == 3 and words[0] == "compare":
        out = out or f"{words[2].rstrip('/')}/compare"
        with step("compare"):
            found = stage.compare(words[1], words[2], out)
        console.show_comparison(found)
        print(f"compare  {out}/compare.html")
    elif len(words) == 1 and out is None:
        with step("report"):
            written = stage.run(words[0])
        console.show(written)
        print(f"report   {words[0].rstrip('/')}/report/report.html")
    else:
        from medusa_ray.config import UserError

        raise UserError(
            f"report got {shlex.join(words)}{' and --out' if out else ''}; expected was the folder of a run, or "
            "`report compare A B` with the folders of two, which alone takes --out."
        )


@app.command()
def profile(
    base: Annotated[str, typer.Argument(help="Folder or hub name of the base.", show_default=False)],
    heads: Annotated[str | None, typer.Option(help="Folder of its heads.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts to answer, such as RUN/prompts/test; none measures steps only."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch sizes; 1, 8 and 32 by default.")
    ] = None,
    against_transformers: Annotated[
        bool, typer.Option("--against-transformers", help="Measure transformers' generate too.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on a CPU.")] = 1,
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    out: Annotated[str | None, typer.Option(help="JSON file or URI that takes all that was measured.")] = None,
) -> None:
    """Step cost by rows and tree nodes on this machine, the tree size it suggests, and speed beside transformers."""
    from rich.table import Table

    from medusa_ray import profile as stage

    with step("profile"):
        found = stage.run(
            base,
            heads,
            prompts,
            num_prompts,
            tuple(batch or (1, 8, 32)),
            against_transformers=against_transformers,
            threads=threads,
            device=device,
            dtype=dtype,
        )
    if out:
        from medusa_ray import provenance

        provenance.write_json(out, found)
    console = Console() if Console().is_terminal else Console(width=160)
    for headers, rows in stage.tables(found):
        grid = Table(*headers)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
    print(f"mode {found['mode']}, {threads} thread(s), {dtype}")


@app.command(context_settings=LENIENT)
def doctor(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[RUN.YAML | SERVE.YAML]", help="What it is to be fit for.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Address of Ray; RAY_ADDRESS or a cluster on this machine by default.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a node has for each answer.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="All that was found, for machines.")] = False,
) -> None:
    """Is this cluster fit for a run or a deployment? Ends with 0 if so, with 1 where there are faults."""
    from medusa_ray import doctor as stage

    found = stage.run(file, tuple(overrides or ()), address, timeout)
    if as_json:
        import json

        print(json.dumps(found, indent=1))
    else:
        from medusa_ray.doctor import console

        console.show(found)
    if not found["is_fit"]:
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of heads.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repo of the hub.", show_default=False)],
    yes: Annotated[
        bool, typer.Option("--yes", help="Send it; without, only say what would be sent.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repo is for all to see.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Made from main where it lacks.")] = "main",
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Medusa heads",
) -> None:
    """Show what of a folder of heads would go to the hub; with --yes, send it as one commit. Private unless said."""
    from huggingface_hub import HfApi
    from rich.table import Table

    from medusa_ray import hub as stage

    api = HfApi()
    planned = stage.plan(folder, repo, revision, public=public, must_see=yes, api=api)
    grid = Table("file", "bytes", "on the hub")
    for file in planned.files:
        grid.add_row(file.name, f"{file.size:,}", planned.state(file))
    Console().print(grid)
    print(f"repo        {repo}")
    print(f"revision    {revision}")
    print(f"visibility  {planned.visibility()}")
    if planned.left_out:
        print(f"left out    {', '.join(planned.left_out)}")
    for note in planned.notes:
        print(f"note        {note}")
    stage.check(planned)
    if yes:
        commit = stage.push(planned, message, api)
        print(f"sent as {repo}@{commit}" if commit else "nothing to send: the hub has all of it")
    else:
        options = ["--yes", *(["--public"] if public else [])]
        options += ["--revision", revision] if revision != "main" else []
        options += ["--message", message] if message != "Medusa heads" else []
        print(f"nothing was sent. This does: {shlex.join(['medusa-ray', 'push', folder, repo, *options])}")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repo of the hub.", show_default=False)],
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="New, empty, or as an earlier pull left it.", show_default=False
        ),
    ],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
) -> None:
    """Put the heads of a repo of the hub into a folder, verified and whole."""
    from huggingface_hub import HfApi

    from medusa_ray import hub as stage

    done = stage.pull(repo, folder, revision, api=HfApi())
    size = f"{len(done.sizes)} files, {sum(done.sizes.values()):,} bytes"
    print(f"{folder}: {size} of {repo}@{done.commit}{'' if done.is_news else ', as it was'}")


@app.command()
def export(
    heads: Annotated[str, typer.Argument(help="Folder or URI of the heads.", show_default=False)],
    out: Annotated[str, typer.Argument(help="A new folder.", show_default=False)],
    layout: Annotated[
        Layout, typer.Option("--format", help="Who is to load the heads.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="Where the base is found, if not where the heads were trained.")
    ] = None,
    materialise: Annotated[
        bool, typer.Option("--materialise", help="Write out layers that the format cannot share.")
    ] = False,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Save the base too, an adapter merged into it, in OUT/base.")
    ] = False,
) -> None:
    """Heads -> a folder that TGI, vLLM, TensorRT-LLM, ModelOpt or FasterDecoding's code loads, bit for bit."""
    from medusa_ray import exchange

    with step("export"):
        exchange.export(heads, out, layout, base, materialise, with_base)


@app.command("import")
def import_(
    folder: Annotated[str, typer.Argument(help="Folder or URI of heads in any format.", show_default=False)],
    out: Annotated[str, typer.Argument(help="A new folder.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Their base, where their config names none.")] = None,
) -> None:
    """Heads that others have written -> heads of ours; the format is seen from the tensors' names."""
    from medusa_ray import exchange

    with step("import"):
        _, notes = exchange.import_heads(folder, out, base)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- jobs

jobs_app = typer.Typer(help="Jobs that `submit` has sent: list, follow and stop them.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265; RAY_API_SERVER_ADDRESS or RAY_ADDRESS by default.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", show_default=False)]


@app.command()
def submit(
    words: Annotated[
        list[str], typer.Argument(metavar="-- VERB ...", help="Any verb, as here.", show_default=False)
    ],
    address: Address = None,
    working_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder or URI that the job starts in; the folder that you are in where VERB names a file of it.",
        ),
    ] = None,
    runtime_env: Annotated[
        str | None, typer.Option(metavar="FILE", help="Ray's runtime environment, as YAML or JSON.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A variable; KEY alone sends its value here."),
    ] = None,
    job_id: Annotated[str | None, typer.Option(metavar="ID", help="VERB and eight digits by default.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's id and leave it; else its log until its end.")
    ] = False,
    send_code: Annotated[
        bool,
        typer.Option("--send-code", help="Send this medusa_ray in place of the one that the cluster has."),
    ] = False,
) -> None:
    """Run a verb as a Ray job: its log comes here, its exit code is this command's; Ctrl-C leaves it running."""
    from medusa_ray.cli import jobs

    verb = jobs.Verb(words)
    environment = jobs.environment(runtime_env, env or (), working_dir, send_code, verb.reads_here())
    checked = verb.check(environment.get("working_dir"))
    client = jobs.connect(address)
    for what, uri in verb.outputs(checked):
        if jobs.is_local(uri) and jobs.has_several_nodes(client):
            print(f"medusa-ray: note: {what} is {uri}, which all nodes must share.", file=sys.stderr)
    sent = jobs.submit(client, verb, environment, job_id)
    print(sent if detach else f"job {sent}", flush=True)
    if not detach:
        raise typer.Exit(jobs.follow(client, sent))


@jobs_app.command("list")
def list_jobs(address: Address = None) -> None:
    """Submitted jobs and how they ended, the newest last."""
    from rich.table import Table

    from medusa_ray.cli import jobs

    grid = Table("job", "status", "started, UTC", "seconds", "exit code", "verb")
    for row in jobs.rows(jobs.connect(address)):
        grid.add_row(*row)
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(grid)


@jobs_app.command("follow")
def follow_job(job_id: JobId, address: Address = None) -> None:
    """The log of a job, from its beginning until its end; the job's exit code."""
    from medusa_ray.cli import jobs

    raise typer.Exit(jobs.follow(jobs.connect(address), job_id))


@jobs_app.command("stop")
def stop_job(job_id: JobId, address: Address = None) -> None:
    """Stop a job, which saves first what it can. Servers that it has started go on."""
    from medusa_ray.cli import jobs

    print(f"{job_id}: {jobs.stop(jobs.connect(address), job_id)}")


# ---------------------------------------------------------------------------------------------------- running


def run_stages(names: tuple[str, ...], run_yaml: str, overrides: list[str] | None) -> None:
    """Runs stages of one file in order, inside one Ray cluster."""
    from medusa_ray import config
    from medusa_ray.cli.cluster import check_writable, cluster

    run_config = config.load(config.RunConfig, run_yaml, overrides or ())
    check_writable(run_config.output)
    with cluster():
        for name in names:
            run_stage(name, run_config)


def run_stage(name: str, run_config: "RunConfig") -> None:
    from medusa_ray import parts

    with step(name) as facts:
        try:
            artifact = importlib.import_module(f"medusa_ray.{name}").run(run_config)
            facts.update(figures(artifact))
        except Exception as error:
            # What failed inside Ray has it as its cause.
            if told := parts.storage_error(getattr(error, "cause", error)):
                raise told from error
            raise


def figures(artifact: str) -> dict[str, Any]:
    """The figures in an artifact's provenance beside what all have; `rows.good` for one inside another."""
    from medusa_ray import provenance

    common = ("key", "written", "command", "config", "inputs", "revision", "versions")
    facts: dict[str, Any] = {}
    for key, value in (provenance.read(artifact) or {}).items():
        if key not in common:
            facts |= (
                {f"{key}.{inner}": figure for inner, figure in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
    return {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in facts.items()
        if isinstance(value, int | float | str)
    }
