"""The command itself, as a process: what it answers, how fast, and with which exit code.

2 is a user's mistake, told in one message; 1 is a bug, with its traceback. A mistake leaves nothing written.
"""

import fcntl
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pyarrow as pa
import pytest

from medusa_ray import cli, parts, provenance, records
from medusa_ray.cli import progress
from medusa_ray.cli.cluster import check_writable
from medusa_ray.cli.estimate import Base, estimate, num_head_parameters
from medusa_ray.config import HeadsConfig, RunConfig, UserError

STAGES = ["data", "distill", "hidden", "train", "evaluate"]
VERBS = ["demo", "validate", "plan", *STAGES, "run", "serve", "bench", "report", "profile", "push", "pull"]
VERBS += ["submit", "jobs"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which costs a third of a second."""
    command = [sys.executable, "-m", "medusa_ray.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ, **environment}
    )


@pytest.fixture
def medusa_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["medusa-ray", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    return call


Command = Callable[..., Done]


def one_message(done: Done | subprocess.CompletedProcess[str]) -> str:
    """What a mistake was answered with, once it is checked to be an answer and no crash."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("medusa-ray: ")]
    assert len(lines) == 1, done.stderr
    return done.stderr[done.stderr.index("medusa-ray: ") :]


def write_run(folder: Path, base: object, chats: object) -> Path:
    config = {
        "output": str(folder / "out"),
        "model": {"base": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(chats)},
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "run.yaml"


# ---------------------------------------------------------------------------------------------------- at once


def test_help_names_every_verb_in_under_half_a_second() -> None:
    """In seconds of the processor, since the wall clock of a busy machine measures its other work."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", done.stdout)] == []
    assert min(taken) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, medusa_ray: Command) -> None:
    done = medusa_ray(verb, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 200


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["trian"], "train"),
        (["validat", "x.yaml"], "validate"),
        (["demo", "--fsat"], "--fast"),
        (["demo", "--dat", "x"], "--data"),
    ],
)
def test_an_unknown_verb_or_option_is_answered_with_the_nearest(
    arguments: list[str], nearest: str, medusa_ray: Command
) -> None:
    done = medusa_ray(*arguments)
    assert done.returncode == 2
    assert nearest in done.stderr


def test_a_bug_shows_its_traceback_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_a_mistake_found_inside_ray_is_still_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ray hands errors of a task back as an error of both classes, whose text is the worker's traceback."""
    from ray.exceptions import RayTaskError

    def mistaken() -> None:
        raise RayTaskError("task", "a long traceback", UserError("prompts are missing")).as_instanceof_cause()

    monkeypatch.setattr(cli, "app", mistaken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "medusa-ray: prompts are missing\n"


# ------------------------------------------------------------------------------------ validate and plan


def test_validate_tells_all_problems_of_all_files_and_loads_nothing_heavy(tmp_path: Path) -> None:
    good = write_run(tmp_path, "some/model", "chats.jsonl")
    bad_run, bad_serve = tmp_path / "bad_run.yaml", tmp_path / "bad_serve.yaml"
    bad_run.write_text(good.read_text().replace('"output"', '"ouput"'))
    bad_serve.write_text("applications: [{name: a, args: {model_id: m, bas: x}}]\n")
    done = process("validate", good, bad_run, bad_serve, PYTHONPROFILEIMPORTTIME="1")
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "pydantic" in loaded
    assert not loaded & {"torch", "ray", "transformers"}
    assert done.returncode == 2
    assert str(good) in done.stdout
    for problem in (
        f"{bad_run}:",
        "ouput is not a key; did you mean output?",
        f"{bad_serve}:",
        "did you mean applications.0.args.base?",
    ):
        assert problem in done.stderr


def test_validate_accepts_good_files_with_exit_code_0(tmp_path: Path, medusa_ray: Command) -> None:
    assert medusa_ray("validate", write_run(tmp_path, "some/model", "chats.jsonl")).returncode == 0


def test_plan_counts_and_writes_nothing(tmp_path: Path, medusa_ray: Command) -> None:
    base = tmp_path / "base"
    base.mkdir()
    # Llama 3.1 8B: 8,030,261,248 parameters by its own card.
    llama = {"hidden_size": 4096, "vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32}
    (base / "config.json").write_text(
        json.dumps({**llama, "num_key_value_heads": 8, "intermediate_size": 14336})
    )
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a"}\n' * 7)
    before = sorted(tmp_path.rglob("*"))
    done = medusa_ray(
        "plan",
        write_run(tmp_path, base, tmp_path / "chats.jsonl"),
        "train.epochs=2",
        "distill.max_new_tokens=101",
    )
    assert done.returncode == 0, done.stderr
    assert "epochs: 2" in done.stdout
    figures = dict(
        line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line and not line.startswith(" ")
    )
    figures = {name: value.strip() for name, value in figures.items()}
    assert figures["training rows"] == "7"
    assert figures["parameters of the base"] == "8,030.3 M"
    # Three heads, each a square layer with bias and an output layer of its own.
    assert figures["parameters of the heads"] == f"{3 * (4096 * 4097 + 4096 * 128256) / 1e6:,.1f} M"
    assert figures["hidden/ on disk"] == f"at most {7 * 100 * 4096 * 4 / 2**20:,.1f} MiB"
    assert figures["optimizer steps"] == "at most 4"  # 700 positions in batches of 512, twice
    assert figures["passes of the base"] == "none: states are captured while distilling"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "run.yaml"])


@pytest.mark.parametrize(
    ("layout", "draft_vocab_size", "expected"),
    [
        ("own", None, 4096 * 128256),
        ("own", 32000, 4096 * 32000),
        ("shared", 32000, 0),
        ("lowrank", None, 8 * (4096 + 128256)),
        ("lowrank", 32000, 8 * (4096 + 32000)),
    ],
)
def test_parameters_of_the_heads_are_those_that_they_have(
    layout: str, draft_vocab_size: int | None, expected: int
) -> None:
    base = Base(4096, 14336, 32, 32, 128256, 8, 128, False)
    heads = HeadsConfig(num_heads=2, layout=layout, rank=8, draft_vocab_size=draft_vocab_size)
    assert num_head_parameters(base, heads) == 2 * (4096 * 4097 + expected)


def test_plan_counts_what_is_there_and_bounds_the_rest(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "intermediate_size": 64}))
    write_lines = "".join('{"prompt": "a"}\n' for _ in range(9))
    (tmp_path / "chats.jsonl").write_text(write_lines)

    def figures(mode: str = "compute", loss_on: str = "last") -> dict[str, str]:
        raw = {"output": str(tmp_path), "model": {"base": str(tmp_path), "dtype": "float32"}}
        data = {"train": str(tmp_path / "chats.jsonl"), "max_prompt_tokens": 100, "loss_on": loss_on}
        hidden = {"mode": mode, "top_k": 4}
        distill = {"max_new_tokens": 50}
        config = RunConfig.model_validate({**raw, "data": data, "hidden": hidden, "distill": distill})
        return dict(estimate(config))

    passes = "passes of the base"
    assert figures()["positions of hidden states"] == f"at most {9 * 49}"
    assert figures()[passes] == f"1, of at most {9 * 150:,} tokens"
    rows: list[dict[str, Any]]
    rows = [
        {"id": "a", "prompt_ids": [1] * 7},
        {"id": "b", "error": "too long: very"},
        {"id": "c", "prompt_ids": [1]},
    ]
    parts.write(f"{tmp_path}/prompts/train", "part-000000", pa.Table.from_pylist(rows, records.PROMPTS))
    provenance.write(f"{tmp_path}/prompts", {}, {})
    assert figures()["positions of hidden states"] == f"at most {2 * 49}"
    assert figures()[passes] == f"1, of at most {7 + 1 + 100} tokens"
    rows = [
        {"id": "a", "prompt_ids": [1] * 7, "reply_ids": [1] * 6},
        {"id": "c", "prompt_ids": [1], "reply_ids": [1]},
    ]
    parts.write(f"{tmp_path}/distilled", "part-000000", pa.Table.from_pylist(rows, records.DISTILLED))
    provenance.write(f"{tmp_path}/distilled", {}, {})
    assert figures()["positions of hidden states"] == "5"
    assert figures()["hidden/ on disk"] == f"{(5 * 64 * 4 + 6 * 4 * 8) / 2**20:,.1f} MiB"
    assert figures(loss_on="all")["positions of hidden states"] == "11"
    assert figures("stream")["hidden/ on disk"] == "nothing: hidden.mode is stream"
    assert figures("stream")[passes] == "5, of 75 tokens in all"


def test_plan_knows_what_moments_in_8_bits_spare(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "vocab_size": 32768, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "intermediate_size": 64}))

    def gib(**train: Any) -> float:
        raw = {"output": "o", "model": {"base": str(tmp_path)}, "data": {"train": "d"}, "train": train}
        return float(dict(estimate(RunConfig.model_validate(raw)))["memory of a train worker"].split()[0])

    num_weights = 3 * (32768 * 4096 + 4096 * 4097)
    for dtype in ("float32", "bfloat16"):
        spared = gib(zero_stage=0, dtype=dtype) - gib(zero_stage=0, dtype=dtype, optimizer="adamw_8bit")
        assert spared == pytest.approx(num_weights * (8 - 2 - 2 * 4 / 256) / 2**30, abs=0.02)


def test_plan_of_a_base_out_of_reach_says_so(tmp_path: Path, medusa_ray: Command) -> None:
    done = medusa_ray("plan", write_run(tmp_path, "nobody/nothing", "s3://bucket/chats"))
    assert done.returncode == 0, done.stderr
    assert "on disk or on a hub in reach" in done.stdout
    assert "cannot be counted cheaply" in done.stdout


@pytest.mark.parametrize("verb", ["plan", "data", "run"])
@pytest.mark.parametrize("mistake", ["train.lerning_rate=1", "--medusa_num_heads", "epochs"])
def test_a_wrong_override_is_told_before_anything_starts(
    verb: str, mistake: str, tmp_path: Path, medusa_ray: Command
) -> None:
    done = medusa_ray(verb, write_run(tmp_path, "some/model", "chats.jsonl"), mistake)
    message = one_message(done)
    assert mistake.split("=")[0] in message
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- what cannot be used


def bad_chats(folder: Path) -> dict[str, Path]:
    """Files that are no chats, by what is wrong with them."""
    texts = {
        "empty": "",
        "no_messages": '{"messages": [{"role": "user", "content": "a"}]}\n{"question": "b"}\n',
        "no_json": "{",
    }
    files = {name: folder / f"{name}.jsonl" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    (folder / "folder").mkdir()
    return {**files, "missing": folder / "missing.jsonl", "unreadable": folder / "folder"}


BAD_CHATS = {
    "missing": "missing.jsonl",
    "unreadable": "folder",
    "empty": "empty.jsonl",
    "no_messages": "row 2",
    "no_json": "no_json.jsonl",
}


@pytest.mark.parametrize(("what", "named"), BAD_CHATS.items())
def test_the_demo_refuses_chats_that_are_none_and_writes_nothing(
    what: str, named: str, tmp_path: Path, medusa_ray: Command
) -> None:
    done = medusa_ray("demo", "--out", tmp_path / "out", "--data", bad_chats(tmp_path)[what])
    assert named in one_message(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_a_stage_refuses_chats_that_are_none_and_writes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    done = process("data", write_run(tmp_path, tiny_base, bad_chats(tmp_path)["no_messages"]))
    assert "row 2" in one_message(done)
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.parametrize("out", ["/proc/medusa", "{file}/below"])
def test_an_output_folder_that_cannot_be_written_is_refused_by_name(
    out: str, tmp_path: Path, medusa_ray: Command
) -> None:
    """As root every permission is granted, so these are places where no folder can be made at all."""
    (tmp_path / "file").write_text("")
    out = out.format(file=tmp_path / "file")
    assert out in one_message(medusa_ray("demo", "--out", out))
    run = write_run(tmp_path, "some/model", "chats.jsonl")
    assert out in one_message(medusa_ray("data", run, f"output={out}"))


def test_checking_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_refused_by_number(tmp_path: Path, medusa_ray: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = medusa_ray("demo", "--out", tmp_path / "out", "--port", port)
    assert str(port) in one_message(done)
    assert not (tmp_path / "out").exists()


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path, medusa_ray: Command) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = medusa_ray("demo", "--out", tmp_path)
    assert str(tmp_path) in one_message(done)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_unknown_size_of_base_is_refused_by_name(tmp_path: Path, medusa_ray: Command) -> None:
    done = medusa_ray("demo", "--out", tmp_path / "out", "--train-base", "70b")
    assert done.returncode == 2
    assert "70b" in done.stderr
    assert "0.9m" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_sizes_that_the_command_offers_are_those_with_a_recipe() -> None:
    from medusa_ray.demo.train_base import RECIPES

    assert set(get_args(cli.BaseSize)) == set(RECIPES)


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "some/model", "chats.jsonl")
    done = process("data", run, RAY_ADDRESS="127.0.0.1:1")
    assert "RAY_ADDRESS='127.0.0.1:1'" in one_message(done)


@pytest.mark.parametrize("verb", ["serve", "bench", "report"])
def test_a_missing_file_is_refused_by_name(verb: str, tmp_path: Path, medusa_ray: Command) -> None:
    assert "nowhere" in one_message(medusa_ray(verb, tmp_path / "nowhere"))


# --------------------------------------------------------------------------------------------------- progress


def test_a_piped_step_tells_what_it_is_at_in_json_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.05)
    with progress.step("train") as facts:
        logging.getLogger("medusa_ray").info("step=%d loss=%.2f", 7, 1.5)
        time.sleep(0.2)
        logging.getLogger("medusa_ray").warning("a proxy did not start in time")
        facts["rows"] = 3
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {
        "stage": "train",
        "state": "running",
        "seconds": lines[0]["seconds"],
        "step": 7,
        "loss": 1.5,
    }
    assert {"stage": "train", "state": "warning", "message": "a proxy did not start in time"} in lines
    assert lines[-1] == {"stage": "train", "state": "done", "seconds": lines[-1]["seconds"], "rows": 3}


def test_a_step_that_fails_is_not_called_done(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError), progress.step("train"):
        raise RuntimeError
    assert "done" not in capsys.readouterr().err
