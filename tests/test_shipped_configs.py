"""The YAML files that ship: each is valid for us, and a serve file for Ray Serve too."""

from pathlib import Path

import pytest

from medusa_ray import config
from medusa_ray.cli.estimate import estimate

REPOSITORY = Path(__file__).parents[1]
FILES = sorted([*REPOSITORY.glob("train_configs/*.yaml"), *REPOSITORY.glob("serve_configs/*.yaml")])
KINDS = {file: config.kind_of(config.read(file)) for file in FILES if not file.stem.startswith("kuberay_")}
RUNS = [file for file, kind in KINDS.items() if kind is config.RunConfig]


def named(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", FILES, ids=named)
def test_a_shipped_file_is_valid(file: Path) -> None:
    config.parse_any(config.read(file), str(file))


def test_each_kind_of_file_has_an_example() -> None:
    assert set(KINDS.values()) == {config.RunConfig, config.ServeConfig, config.TrafficConfig}


@pytest.mark.parametrize(
    "file", [file for file, kind in KINDS.items() if kind is config.ServeConfig], ids=named
)
def test_ray_serve_takes_a_serve_file_as_it_is(file: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    ours = config.load(config.ServeConfig, file)
    theirs = ServeDeploySchema.model_validate(config.read(file))
    assert [app.name for app in theirs.applications] == [app.name for app in ours.applications]
    assert [app.args for app in theirs.applications] == [
        app["args"] for app in config.read(file)["applications"]
    ]
    assert theirs.http_options.host == "127.0.0.1"


@pytest.mark.parametrize("file", RUNS, ids=named)
def test_the_plan_of_a_run_counts_its_steps_or_says_why_not(file: Path) -> None:
    names = [name for name, _ in estimate(config.load(config.RunConfig, file))]
    assert names[:2] == ["training rows", "positions in a training step"]


@pytest.mark.parametrize("folder", ["train_configs", "serve_configs"])
def test_every_shipped_file_is_listed_in_its_folders_readme(folder: str) -> None:
    readme = (REPOSITORY / folder / "README.md").read_text(encoding="utf-8")
    names = [file.name for file in (REPOSITORY / folder).iterdir() if file.is_file() and file.name != "README.md"]
    assert [name for name in names if name not in readme] == []


def test_the_llama_run_is_the_blogs_flag_by_flag() -> None:
    run = config.load(config.RunConfig, REPOSITORY / "train_configs" / "llama31_8b_text_to_sql.yaml")
    train = run.train
    assert (train.epochs, train.gradient_accumulation_steps, train.num_workers) == (5, 4, 4)
    assert (train.learning_rate, train.lr_scheduler, train.warmup_steps, train.logging_steps) == (
        5e-4,
        "cosine",
        40,
        10,
    )
    assert (run.heads.num_heads, run.heads.num_layers, run.data.max_prompt_tokens) == (3, 1, 2048)
    assert (run.model.dtype, train.dtype, run.distill.replies) == ("bfloat16", "bfloat16", "given")
