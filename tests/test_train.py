"""Training of the heads: every position once per epoch, in an order that a resumed run repeats."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from medusa_ray import distill, hidden, parts, provenance, records, train
from medusa_ray.config import HeadsConfig, RunConfig, TrainConfig, UserError, parse
from medusa_ray.medusa.heads import WEIGHTS, MedusaHeads
from medusa_ray.medusa.loss import IGNORED, medusa_loss, num_losses, whole_cross_entropy
from medusa_ray.train import checkpoints, engine, order
from medusa_ray.train.corpus import Corpus, is_held_out
from medusa_ray.train.engine import HeadTrainer, deepspeed_config
from medusa_ray.train.feed import Feed, Wanted, from_disk
from medusa_ray.train.journal import CURVE, Journal, check_trackers, read_curve
from medusa_ray.train.order import Plan, cut
from medusa_ray.train.rows import Batch, joined, places_of
from medusa_ray.train.watch import Trace
from medusa_ray.train.worker import Job, Run, State, learning_rate

V = 24  # and the hidden size: a state is its token, one-hot
PROMPT, REPLY = 3, 11  # so 10 positions a row, and 9 of them with a label
STEP = 7  # a reply counts on in steps of 7


def write_run(
    folder: Path, num_rows: int = 60, states: str = "float32", size: int = V, **settings: Any
) -> RunConfig:
    """A base and hidden/ that heads can learn from: each token follows from the one before."""
    (folder / "base").mkdir()
    output_VC = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    save_file({"lm_head.weight": output_VC}, folder / "base/model.safetensors")
    rows = []
    for row in range(num_rows):
        ids = [(row + STEP * place) % V for place in range(PROMPT + REPLY)]
        states_NC = 4 * torch.eye(size, dtype=getattr(torch, states))[ids[PROMPT - 1 : -2]]
        raw = states_NC.view(torch.uint8).numpy().tobytes()
        rows.append(records.hidden_row(f"{row}/0/0", ids[:PROMPT], ids[PROMPT:], raw, "last"))
    for part in range(3):
        table = records.hidden_table(rows[part::3], states, size)
        parts.write(str(folder / "hidden"), parts.part_name(part), table)
    provenance.write(str(folder / "hidden"), {}, {})
    raw_config = {
        "output": str(folder),
        "model": {"base": str(folder / "base"), "device": "cpu", "dtype": states},
        "data": {"train": "unused"},
        "heads": settings.pop("heads", {}),
        "train": {
            "num_workers": 2,
            "batch_size": 8,
            "epochs": 2,
            "dtype": "float32",
            "held_out": 0,
            **settings,
        },
    }
    return parse(RunConfig, raw_config, "test")


def corpus_of(config: RunConfig) -> Corpus:
    return Corpus.survey(config.artifact("hidden"), config, V)


def feed_of(config: RunConfig, rank: int) -> Feed:
    corpus = corpus_of(config)
    source = from_disk(config.artifact("hidden"))
    return Feed(corpus.counts, corpus.names, config.train.seed, source, corpus.form, rank)


def steps_of(feed: Feed, plan: Plan, done: int = 0, batch_size: int = 8) -> Iterator[list[Batch]]:
    return feed.open([], [plan], done, batch_size)[1]


def epoch_of(config: RunConfig, number: int = 0) -> Plan:
    settings = config.train
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    spans = ((0, corpus_of(config).num_positions),)
    return Plan(number, spans, settings.num_workers, per_step)


def everything_of(config: RunConfig) -> Batch:
    """All positions that have a label."""
    feed, hidden = feed_of(config, 0), config.artifact("hidden")
    rows = [(name, np.arange(parts.num_rows(hidden, name))) for name in parts.names(hidden)]
    return joined(feed.open(rows, [], 0, 8)[0])


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_every_position_is_taken_once_in_an_epoch(dtype: str, num_workers: int, tmp_path: Path) -> None:
    """A state beside another position's labels still trains; only acceptance drops."""
    config = write_run(tmp_path, states=dtype, num_workers=num_workers, gradient_accumulation_steps=3)
    plan = epoch_of(config)
    shares = [list(steps_of(feed_of(config, rank), plan)) for rank in range(num_workers)]
    assert {len(share) for share in shares} == {plan.num_steps} == {-(-600 // (num_workers * 24))}
    assert all(len(micro_batches) == 3 for share in shares for micro_batches in share)
    taken: Counter[tuple[str, int]] = Counter()
    for batch in (batch for share in shares for micro_batches in share for batch in micro_batches):
        assert 1 <= len(batch) <= 8
        assert batch.hidden_NC.dtype == getattr(torch, dtype)
        if (batch.labels_NH == IGNORED).all():
            continue  # stands where nothing is left
        token_N = batch.hidden_NC.argmax(dim=1)
        for head in range(3):
            known_N = batch.labels_NH[:, head] != IGNORED
            expected_N = (token_N + STEP * (head + 2)) % V
            assert torch.equal(batch.labels_NH[known_N, head], expected_N[known_N])
        taken.update(zip(batch.id_N, token_N.tolist(), strict=True))
    assert len(taken) == taken.total() == 60 * (REPLY - 1)


def test_a_part_is_labelled_as_its_rows_would_be_one_by_one(tmp_path: Path) -> None:
    config = write_run(tmp_path, num_rows=0)
    for row, (prompt, reply) in enumerate([([1, 2, 3], [4, 5, 6, 7]), ([8], [9, 10]), ([1, 1], [2] * 9)]):
        raw = bytes(4 * V * (len(reply) - 1))
        table = records.hidden_table(
            [records.hidden_row(f"{row}/0/0", prompt, reply, raw, "last")], "float32", V
        )
        parts.write(config.artifact("hidden"), f"part-{row:06}", table)
    tables = [parts.read(config.artifact("hidden"), name) for name in parts.names(config.artifact("hidden"))]
    whole = places_of(pa.concat_tables(tables), 3).labels_NH
    assert torch.equal(whole, torch.cat([places_of(table, 3).labels_NH for table in tables]))
    assert whole[:4].tolist() == [[5, 6, 7], [6, 7, -100], [7, -100, -100], [10, -100, -100]]


def test_the_order_follows_from_seed_and_epoch(tmp_path: Path) -> None:
    config = write_run(tmp_path)

    def order(epoch: int, seed: int) -> list[str]:
        feed = feed_of(config, 0)
        feed.seed = seed
        return [name for step in steps_of(feed, epoch_of(config, epoch)) for b in step for name in b.id_N]

    assert order(1, 0) == order(1, 0)
    assert order(0, 0) != order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert len(set(order(0, 0)[:40])) > 3  # rows of a part do not come in their order


def test_a_plan_that_others_go_on_with_takes_the_rest_and_nothing_twice() -> None:
    plan = Plan(0, ((0, 1000),), 3, 10)
    taken = {place for rank in range(3) for a, b in cut(plan.share(rank), 0, 70) for place in range(a, b)}
    assert len(taken) == 210
    rest = Plan(0, plan.rest(7), 2, 25)
    shares = [{place for a, b in rest.share(rank) for place in range(a, b)} for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 395
    assert taken | shares[0] | shares[1] == set(range(1000))
    again = Plan(0, rest.rest(3), 1, 5)
    assert sum(end - start for start, end in again.spans) == 1000 - 210 - 150


def test_a_step_takes_as_many_positions_whatever_the_number_of_workers(tmp_path: Path) -> None:
    """Fewer take more each, so that learning rates and the number of steps stay what they were."""
    config = write_run(tmp_path, num_rows=200, num_workers="1-4", gradient_accumulation_steps=2)
    full = Job.of(config, corpus_of(config), None, "cpu")  # 200 rows of 10 positions, in steps of 4 * 2 * 8
    found = {n: replace(full, num_workers=n) for n in (4, 3, 2, 1)}
    assert {n: (job.per_step, job.num_micro_batches) for n, job in found.items()} == {
        4: (16, 2), 3: (22, 3), 2: (32, 4), 1: (64, 8),
    }  # fmt: skip
    assert {n: job.epoch(0).num_steps for n, job in found.items()} == {4: 32, 3: 31, 2: 32, 1: 32}
    for n, job in found.items():
        shares = [list(steps_of(feed_of(config, rank), job.epoch(0))) for rank in range(n)]
        assert {len(micro) for share in shares for micro in share} == {job.num_micro_batches}
        ids = [row_id for share in shares for micro in share for batch in micro for row_id in batch.id_N if row_id]
        assert Counter(Counter(ids).values()) == {10: 200}


def test_windows_of_a_long_line_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker would otherwise have to hold all states."""
    monkeypatch.setattr(order, "WINDOW_POSITIONS", 50)
    counts = [np.full(4, 5) for _ in range(12)]  # parts of 20 positions, 60 in a window
    line = order.Line(counts, 0, 0)
    assert line.length == 240
    assert [len(window) for window in line.windows] == [3, 3, 3, 3]
    pieces = list(line.pieces(((30, 130),)))
    assert [piece.high - piece.low for piece in pieces] == [30, 60, 10]
    # Of the last window, the two rows that the stretch reaches into, and no other.
    assert len(pieces[-1].row_R) == 2
    whole = [zip(piece.part_R, piece.row_R, strict=True) for piece in line.pieces(((0, 240),))]
    assert sorted(pair for pairs in whole for pair in pairs) == [
        (part, row) for part in range(12) for row in range(4)
    ]


def test_one_reading_serves_held_out_rows_and_all_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many readings would give, since a resumed run begins in the middle; and nothing is read far ahead."""
    monkeypatch.setattr(order, "WINDOW_POSITIONS", 50)
    config = write_run(tmp_path, num_rows=120, held_out=0.2, gradient_accumulation_steps=2)
    corpus, plans = corpus_of(config), [epoch_of(config, number) for number in range(3)]
    readings = []

    def source(wanted: Iterable[Wanted]) -> Iterator[pa.Table]:
        readings.append(0)
        for table in from_disk(config.artifact("hidden"))(wanted):
            readings[-1] += len(table)
            yield table

    feed = Feed(corpus.counts, corpus.names, config.train.seed, source, corpus.form, 1)
    held_out, steps = feed.open(corpus.held_out, plans, 2, 8)
    num_held = sum(len(row_R) for _, row_R in corpus.held_out)
    first = next(steps)
    time.sleep(0.2)  # for the thread that reads ahead
    # The window of the step, one in the making and one that waits, of 40 rows each.
    assert len(readings) == 1
    assert readings[0] <= num_held + 3 * 40
    found = [first, *steps]
    assert len(readings) == 1
    expected = [step for plan in plans for step in steps_of(feed, plan, 2 if plan is plans[0] else 0)]
    assert len(found) == len(expected) == 3 * plans[0].num_steps - 2
    for micro_batches, expected_batches in zip(found, expected, strict=True):
        for batch, expected_batch in zip(micro_batches, expected_batches, strict=True):
            assert batch.id_N.tolist() == expected_batch.id_N.tolist()
            assert torch.equal(batch.hidden_NC, expected_batch.hidden_NC)
            assert torch.equal(batch.labels_NH, expected_batch.labels_NH)
    ids = {name for batch in held_out for name in batch.id_N}
    assert len(ids) == num_held
    assert not ids & {name for step in found for batch in step for name in batch.id_N}


def test_states_that_do_not_fill_their_positions_are_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, num_rows=3, num_workers=1)
    row = records.hidden_row("9/0/0", [1, 2], [3, 4, 5], bytes(4 * V), "last")
    parts.write(config.artifact("hidden"), "part-000009", records.hidden_table([row], "float32", V))
    with pytest.raises(
        ValueError, match=r"row 9/0/0 of hidden/ has 96 bytes of states, but its positions need 192"
    ):
        list(steps_of(feed_of(config, 0), epoch_of(config)))


def test_held_out_chats_are_not_trained_on(tmp_path: Path) -> None:
    config = write_run(tmp_path, held_out=0.2)
    corpus = corpus_of(config)
    held = {name: set(rows.tolist()) for name, rows in corpus.held_out}
    num_held = sum(map(len, held.values()))
    assert 6 <= num_held <= 18  # of 60
    assert corpus.num_positions == (60 - num_held) * (REPLY - 1)
    seen = {name for step in steps_of(feed_of(config, 0), epoch_of(config)) for b in step for name in b.id_N}
    tables = {name: parts.read(config.artifact("hidden"), name)["id"].to_pylist() for name in corpus.names}
    assert not seen & {tables[name][row] for name, rows in held.items() for row in rows}
    assert is_held_out("chat/0/0", 0.5) == is_held_out("chat/7/1", 0.5)


def test_the_draft_vocabulary_is_what_labels_name_most(tmp_path: Path) -> None:
    """Tokens of the prompt are no labels, nor is the first of the reply, which the base itself says."""
    config = write_run(tmp_path, num_rows=0, heads={"num_heads": 2, "draft_vocab_size": 3})
    for number, reply in enumerate([[9, 5, 5, 5, 7, 20], [9, 9, 7, 20]]):
        row = records.hidden_row(f"{number}/0/0", [9, 9, 9], reply, bytes(4 * V * (len(reply) - 1)), "last")
        parts.write(config.artifact("hidden"), f"part-{number:06}", records.hidden_table([row], "float32", V))
    # Labels of head 0: 5 5 5 7 20 and 9 7 20; of head 1: 5 5 7 20 and 7 20. The base's own are 9 and 9.
    corpus = corpus_of(config)
    token_map_M, coverage = corpus.draft(config.heads, V)
    assert token_map_M.tolist() == [5, 7, 20]
    assert coverage == pytest.approx(13 / 14)
    assert corpus.draft(HeadsConfig(), V) == (None, 1.0)
    with pytest.raises(UserError, match=f"draft_vocab_size is {V + 1}, but the base has a vocabulary of {V}"):
        corpus.draft(HeadsConfig(draft_vocab_size=V + 1), V)


# ------------------------------------------------------------------------------------------------ wrong input


def test_hidden_states_must_be_finished(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "hidden" / provenance.FILE).unlink()
    with pytest.raises(UserError, match="hidden is not finished"):
        train.run(config)


@pytest.mark.parametrize("reply", [[4], [4, 5]])
def test_rows_without_a_label_stop_the_run_before_training(reply: list[int], tmp_path: Path) -> None:
    config = write_run(tmp_path, num_rows=0)
    row = records.hidden_row("0/0/0", [1, 2, 3], reply, bytes(4 * V * (len(reply) - 1)), "last")
    parts.write(config.artifact("hidden"), "part-000000", records.hidden_table([row], "float32", V))
    expected = rf"has {len(reply) - 1} positions with a label .* train.num_workers=2"
    with pytest.raises(UserError, match=expected):
        train.run(config)


def test_hidden_states_of_another_base_are_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with pytest.raises(UserError, match=r"part-000000.parquet has hidden_size=24 .* has a hidden size of 99"):
        Corpus.survey(config.artifact("hidden"), config, 99)


# ------------------------------------------------------------------------------------------------ schedule


def test_the_learning_rate_warms_up_and_falls() -> None:
    def rates(shape: str) -> list[float]:
        config = TrainConfig(learning_rate=1.0, warmup_steps=4, lr_scheduler=shape)
        return [round(learning_rate(step, 12, config), 3) for step in range(12)]

    warm_up = [0.25, 0.5, 0.75, 1.0]
    assert rates("constant") == warm_up + [1.0] * 8
    assert rates("linear") == [*warm_up, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine") == [*warm_up, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]


def test_initial_weights_follow_from_the_seed() -> None:
    """Ranks that begin apart are made equal by DeepSpeed; runs are not."""

    def initial(seed: int) -> torch.Tensor:
        settings = TrainConfig(seed=seed), torch.zeros(V, V), None
        return HeadTrainer(HeadsConfig(layout="lowrank"), *settings).heads.low_rank_term(1).down.weight

    assert torch.equal(initial(3), initial(3))
    assert not torch.equal(initial(3), initial(4))


def test_deepspeed_is_told_all_that_the_config_says() -> None:
    config = TrainConfig(batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7, zero_stage=2)
    found = deepspeed_config(config)
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 5
    assert found["gradient_clipping"] == 0.7
    assert found["zero_optimization"] == {"stage": 2}
    assert found["bf16"] == {"enabled": True}


# The file that the original command names, as its repository has it.
BLOG_FILE = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_a_deepspeed_file_of_ones_own_is_taken_where_it_agrees(tmp_path: Path) -> None:
    def found(content: dict[str, Any], **settings: Any) -> dict[str, Any]:
        (tmp_path / "deepspeed.json").write_text(json.dumps(content))
        return deepspeed_config(TrainConfig(deepspeed=str(tmp_path / "deepspeed.json"), **settings))

    plain = deepspeed_config(TrainConfig(zero_stage=3))
    assert found(BLOG_FILE, zero_stage=3) == plain | {"zero_optimization": {"stage": 3, "overlap_comm": True}}
    assert found({"optimizer": {"type": "Lamb", "params": {}}})["optimizer"]["type"] == "Lamb"
    with pytest.raises(UserError, match=r"says zero_optimization.stage: 3, but train.zero_stage makes it 1"):
        found(BLOG_FILE)
    with pytest.raises(UserError, match=r"says gradient_clipping: 5.0, but train.max_grad_norm makes it 1.0"):
        found({"gradient_clipping": 5.0})
    with pytest.raises(UserError, match=r"has a scheduler, but learning rates follow train\.lr_scheduler"):
        found({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}})
    with pytest.raises(UserError, match="cannot be read"):
        deepspeed_config(TrainConfig(deepspeed=str(tmp_path / "none.json")))


# ------------------------------------------------------------------------------------------------ keeping


def write_checkpoints(training: Path, *steps: int) -> None:
    for step in steps:
        tensors = {"weight/a": torch.full((3,), float(step)), "exp_avg/a": torch.zeros(3)}
        checkpoints.write(str(training), step, {"step": step}, tensors)


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 5, 10)
    found = checkpoints.newest(str(tmp_path))
    assert (found.name, found.state) == ("step_00000010", {"step": 10})
    assert found.tensors.keys() == {"weight/a", "exp_avg/a"}
    assert found.tensors["weight/a"].tolist() == [10.0] * 3
    files = {"manifest.json", "state.json", "weight.safetensors", "exp_avg.safetensors"}
    assert {path.name for path in (tmp_path / "step_00000010").iterdir()} == files
    assert checkpoints.newest(str(tmp_path / "none")) is None


@pytest.mark.parametrize("harm", ["bit", "cut", "no manifest", "no file", "wrong manifest"])
def test_a_broken_checkpoint_is_passed_over_and_named(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoints(tmp_path, 5, 10)
    newest = tmp_path / "step_00000010"
    weights = newest / "weight.safetensors"
    whole = bytearray(weights.read_bytes())
    if harm == "bit":
        whole[-1] ^= 1
        weights.write_bytes(whole)
    elif harm == "cut":
        weights.write_bytes(whole[:-4])
    elif harm == "no file":
        weights.unlink()
    elif harm == "no manifest":  # which is written last
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    assert checkpoints.newest(str(tmp_path)).name == "step_00000005"
    assert "checkpoint=step_00000010 is not whole" in caplog.text


def test_the_two_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.keep(str(tmp_path), {"step_00000002"})
    assert checkpoints.names(str(tmp_path)) == ["step_00000002", "step_00000004", "step_00000005"]


def test_the_unfinished_run_of_another_config_is_not_gone_on_with(tmp_path: Path) -> None:
    def begin(rate: float, data: str = "a", **free: int) -> bool:
        settings = {"revision": None, "train": {"learning_rate": rate, "seed": 0, **free}}
        return train.begin(str(tmp_path / "training"), settings, {"hidden": data})

    assert not begin(0.1, num_workers=1)
    write_checkpoints(tmp_path / "training", 5)
    assert begin(0.1, num_workers=2)
    with pytest.raises(
        UserError, match=r"is another: train.learning_rate was 0.1, and is 0.2. Set these back"
    ):
        begin(0.2)
    with pytest.raises(UserError, match="hidden was a, and is b"):
        begin(0.1, "b")
    train.finish(str(tmp_path / "training"))
    assert not begin(0.2)  # what is over is in nobody's way
    assert not checkpoints.names(str(tmp_path / "training"))


def test_lines_of_the_curve_are_logged_as_they_are_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "medusa_ray")
    record = {"step": 5, "of": 10, "loss": 1.23456, "top1": [0.5, 0.25]}
    record["held_out"] = {"loss": 1.5, "tokens_per_step": {"chain": 1.234, "tree_8": 2.0}}
    with train.relayed(f"{tmp_path}/{CURVE}"):
        (tmp_path / CURVE).write_text(json.dumps(record) + "\n" + '{"step": 6, "lo')
    expected = (
        "stage=train step=5 of=10 loss=1.235 top1=0.500,0.250 held_out_loss=1.500 chain=1.23 tree_8=2.00"
    )
    assert caplog.messages == [expected]


class Recorder(ModuleType):
    """Stands for a tracker's package: whatever is called is written down."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments: Any, **named: Any) -> "Recorder":
            self.calls.append((name, (arguments, named)))
            return self

        return called


@pytest.mark.parametrize(("tracker", "log"), [("wandb", "log"), ("mlflow", "log_metrics")])
def test_trackers_are_told_what_the_curve_says(
    tracker: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Recorder(tracker)
    monkeypatch.setitem(sys.modules, tracker, told)
    journal = Journal(str(tmp_path / "my_run/heads"), TrainConfig(trackers=[tracker]), [])
    judged = {"loss": 2.0, "top1": [0.3, 0.1], "tokens_per_step": {"chain": 1.5}}
    journal.add({"step": 10, "loss": 1.0, "top1": [0.5, 0.25], "held_out": judged})
    expected = {
        "loss": 1.0, "top1/head_0": 0.5, "top1/head_1": 0.25, "held_out/loss": 2.0, "held_out/top1/head_0": 0.3,
        "held_out/top1/head_1": 0.1, "held_out/tokens_per_step/chain": 1.5,
    }  # fmt: skip
    assert told.calls[-1] == (log, ((expected,), {"step": 10}))
    assert "my_run" in str(told.calls)


def test_a_tracker_without_its_package_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"has 'wandb', but there is no package of that name. pip install wandb"
    ):
        check_trackers(TrainConfig(trackers=["tensorboard", "wandb"]))


def test_a_trace_of_some_steps_is_written(tmp_path: Path) -> None:
    trace = Trace((2, 3), str(tmp_path))
    for step in range(1, 5):
        trace.before(step)
        torch.ones(3 + step).sum()
        trace.after(step)
        assert (tmp_path / "trace.json").exists() == (step >= 3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shapes = [event.get("args", {}).get("Input Dims") for event in events]
    assert [[5], []] in shapes
    assert [[4], []] not in shapes


# ------------------------------------------------------------------------------------------------ with Ray


def curve_of(config: RunConfig) -> list[dict[str, Any]]:
    return read_curve(f"{config.artifact('heads')}/{CURVE}")


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def what_is_learnt(config: RunConfig) -> list[dict[str, Any]]:
    """The curve without what differs from run to run."""
    clocks = {"positions_per_s", "memory_gib", "share_of_peak", "of"}
    return [{key: value for key, value in record.items() if key not in clocks} for record in curve_of(config)]


def reference_figures(config: RunConfig) -> list[dict[str, Any]]:
    """A single process and plain torch, on the batches that all workers take at a step."""
    output_VC = train.read_output_layer(config.model)
    heads = MedusaHeads(num_heads=3, hidden_size=V, vocab_size=V)
    heads.init_from(output_VC)
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=0.0)
    feeds = [feed_of(config, rank) for rank in range(config.train.num_workers)]
    steps = [steps_of(feed, epoch_of(config), batch_size=config.train.batch_size) for feed in feeds]
    figures = []
    for number, shares in enumerate(zip(*steps, strict=True)):
        whole = joined([batch for micro_batches in shares for batch in micro_batches])
        logits_NHV = heads(whole.hidden_NC)
        head_loss = [F.cross_entropy(logits_NHV[:, h], whole.labels_NH[:, h]) for h in range(3)]
        loss = sum(0.8**h * head_loss[h] for h in range(3))
        figures.append({"loss": loss.item(), "head_loss": [own.item() for own in head_loss]})
        for best in (1, 5):
            is_hit_NH = (logits_NHV.topk(best).indices == whole.labels_NH.unsqueeze(2)).any(dim=2)
            num_labels_H = (whole.labels_NH != IGNORED).sum(dim=0)
            figures[-1][f"top{best}"] = (is_hit_NH.sum(dim=0) / num_labels_H).tolist()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(number, len(curve_of(config)), config.train)
        optimizer.step()
    return figures


def one_rank(rank: int, meeting: Path, configs: list[RunConfig]) -> None:
    """What Ray Train starts, without Ray: one worker, in a group of as many as the configs say."""
    num_workers = configs[0].train.num_workers
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=num_workers)
    for config in configs:
        output_VC = train.read_output_layer(config.model)
        vocab_size, hidden_size = output_VC.shape
        corpus = Corpus.survey(config.artifact("hidden"), config, hidden_size)
        job = Job.of(config, corpus, corpus.draft(config.heads, vocab_size)[0], "cpu")
        start = partial(Run, rank=rank, output_layer_VC=output_VC, counts=corpus.counts)
        run = start(job)
        assert run.take_steps() is None
        if run.journal:
            run.journal.write()
        run.write_heads()
    # Where nothing can be written, all say so, and none waits for another.
    nowhere = replace(job, training=f"{job.output}/config.json/x", output=f"{config.output}/x")
    assert "the checkpoint cannot be written" in (start(nowhere).take_steps() or "")


def train_without_ray(tmp_path: Path, configs: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, by the same processes, which take longer to start than to train."""
    environment = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    num_workers = configs[0].train.num_workers
    torch.multiprocessing.spawn(one_rank, (tmp_path / "meeting", configs), nprocs=num_workers)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_twenty_steps_lose_what_a_single_process_loses(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every stage of ZeRO. Defects D2 and D10: only heads are trained, and figures are of all ranks."""
    settings = {"num_workers": num_workers, "epochs": 1, "logging_steps": 1, "head_weight": 0.8}
    settings |= {"batch_size": 10 // num_workers, "gradient_accumulation_steps": 3, "warmup_steps": 3}
    configs = []
    for stage in range(4):
        (tmp_path / str(stage)).mkdir()
        configs.append(write_run(tmp_path / str(stage), **settings, zero_stage=stage, learning_rate=0.01))
    train_without_ray(tmp_path, configs, monkeypatch)
    expected = reference_figures(configs[0])
    assert len(expected) == 20
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
    for config in configs:
        for record, figures in zip(curve_of(config), expected, strict=True):
            for name, figure in figures.items():
                assert record[name] == pytest.approx(figure, abs=1e-5)


class Reads(TorchFunctionMode):
    """Counts what has Python wait for a device: every number of a tensor that it wants to know."""

    NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    num = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


class PlainEngine:
    """Stands for DeepSpeed's, which waits for the device in its own ways."""

    device = torch.device("cpu")

    def __init__(self, module: HeadTrainer) -> None:
        self.module = module

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """What the optimizer does is none of the worker's."""


def test_a_step_waits_for_the_device_once_whatever_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect D10: the script did so for each head of each micro-batch."""

    def num_reads(num_batches: int, num_heads: int, is_logged: bool) -> int:
        heads = HeadsConfig(num_heads=num_heads)
        run = object.__new__(Run)
        run.engine = PlainEngine(HeadTrainer(heads, TrainConfig(dtype="float32"), torch.randn(V, V), None))
        run.job = replace(Job.of(config, corpus_of(config), None, "cpu"), heads=heads)
        run.train, run.rank, run.stop = run.job.train, 0, None
        run.state, run.weight_W = State(0, run.job.epoch(0), 0, []), run.engine.module.weights()
        batch = Batch(torch.randn(5, V), torch.randint(0, V, (5, num_heads)), None, np.arange(5))
        with Reads() as reads:
            outcome = run._step([batch] * num_batches, is_logged)
        assert (outcome.figures is not None) == is_logged
        return reads.num

    config = write_run(tmp_path)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert num_reads(1, 1, False) == num_reads(4, 3, False) == 1
    assert num_reads(1, 1, True) == num_reads(4, 3, True) == 5  # and loss, head_loss, top1 and top5


def test_the_driver_gets_along_without_deepspeed() -> None:
    """Defect D11: it looks for an accelerator, and where heads are only loaded it need not even be installed."""
    code = "import sys; sys.modules['deepspeed'] = None; import medusa_ray.train, medusa_ray.serve, medusa_ray.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.timeout(600)
def test_moments_in_8_bits_learn_alike_take_a_quarter_and_go_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a size at which bitsandbytes takes 8 bits for every matrix, and 32 for a bias."""
    configs = {}
    for dtype in ("float32", "bfloat16"):
        settings: dict[str, Any] = {"dtype": dtype, "size": 64, "zero_stage": 0, "logging_steps": 1}
        settings |= {"learning_rate": 0.004, "lr_scheduler": "constant", "warmup_steps": 3}
        settings |= {"num_workers": 1, "batch_size": 32}
        for name in ("adamw", "whole", "again"):
            (tmp_path / f"{name} {dtype}").mkdir()
            optimizer = "adamw" if name == "adamw" else "adamw_8bit"
            configs[name, dtype] = write_run(tmp_path / f"{name} {dtype}", optimizer=optimizer, **settings)
        configs["half", dtype] = changed(configs["again", dtype], epochs=1)
    names = ("adamw", "whole", "half", "again")
    in_turn = [configs[name, dtype] for dtype in ("float32", "bfloat16") for name in names]
    train_without_ray(tmp_path, in_turn, monkeypatch)

    for dtype in ("float32", "bfloat16"):
        adamw, whole, again = (configs[name, dtype] for name in ("adamw", "whole", "again"))
        expected, losses = ([record["loss"] for record in curve_of(config)] for config in (adamw, whole))
        assert len(losses) == 38
        assert expected[-1] < 0.5 * expected[0]
        # Both fall from 32 to 0.4, never more than 0.2 apart.
        assert losses == pytest.approx(expected, abs=0.01 * expected[0])
        assert losses[10:] != expected[10:]

        assert what_is_learnt(again) == what_is_learnt(whole)
        heads, training = (f"{whole.output}/{folder}" for folder in ("heads", "training"))
        assert Path(heads, WEIGHTS).read_bytes() == Path(again.artifact("heads"), WEIGHTS).read_bytes()
        saved, saved_again = (checkpoints.newest(f"{config.output}/training") for config in (whole, again))
        assert saved.tensors.keys() == saved_again.tensors.keys()
        for name, tensor in saved.tensors.items():
            assert torch.equal(tensor, saved_again.tensors[name])

        def moment_bytes(training: str) -> int:
            tensors = checkpoints.newest(training).tensors
            return sum(value.nbytes for name, value in tensors.items() if not name.startswith("weight/"))

        matrices, biases = 2 * 3 * 64 * 64, 3 * 64
        assert moment_bytes(f"{adamw.output}/training") == 8 * (matrices + biases)
        assert moment_bytes(training) == 2 * matrices * (1 + 4 / 256) + 8 * biases


def test_moments_in_8_bits_are_refused_where_they_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(joint: dict[str, int] | None = None, **settings: Any) -> RunConfig:
        raw: dict[str, Any] = {"output": "o", "model": {"base": "b"}, "data": {"train": "d"}, "joint": joint}
        return parse(RunConfig, raw | {"train": {"optimizer": "adamw_8bit", **settings}}, "test")

    with pytest.raises(UserError, match=r"train.zero_stage is 1: .* Set train.zero_stage to 0"):
        parsed()
    with pytest.raises(UserError, match=r"joint.zero_stage is 1\. Set joint.zero_stage to 0"):
        parsed(joint={}, zero_stage=0)
    assert parsed(joint={"zero_stage": 0}, zero_stage=0).train.optimizer == "adamw_8bit"

    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"optimizer": {"type": "Lamb", "params": {}}}))
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"has an optimizer, but train.optimizer is 'adamw_8bit'"):
        deepspeed_config(parsed(zero_stage=0, deepspeed=str(file)).train)
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'not installed: pip install "medusa_ray\[quantized\]"'):
        deepspeed_config(parsed(zero_stage=0).train)


def kill_a_worker_at(step: int, config: RunConfig, ended: threading.Event) -> None:
    """SIGKILL for the younger training process of this test's cluster, once the curve is that far."""
    while not ended.wait(0.02):
        curve = curve_of(config)
        if curve and curve[-1]["step"] >= step:
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
            max(workers, key=psutil.Process.create_time).send_signal(signal.SIGKILL)
            return


def watch_actors(found: set[int], ended: threading.Event) -> None:
    """Adds the processes of this test's cluster that hold a base for training."""
    while not ended.wait(0.1):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "_TableProcess" in process.name():
                    found.add(process.pid)


def stop_at(step: int, config: RunConfig) -> None:
    """SIGTERM for this process, which is the driver, once the curve is that far."""
    while not (curve := curve_of(config)) or curve[-1]["step"] < step:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_and_ends_with_the_same_heads(ray_cluster: None, tmp_path: Path) -> None:
    """To the bit: the order of rows, the optimizer and the schedule have all come back."""
    settings = {"batch_size": 4, "save_steps": 100, "learning_rate": 0.01, "max_failures": 0}
    settings |= {"held_out": 0.1, "eval_steps": 150, "zero_stage": 2}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (write_run(tmp_path / name, num_rows=160, **settings) for name in ("whole", "killed"))

    assert train.run(whole) == whole.artifact("heads")
    expected = what_is_learnt(whole)
    num_steps = expected[-1]["step"]

    ended = threading.Event()
    killer = threading.Thread(target=kill_a_worker_at, args=(250, killed, ended))
    killer.start()
    with pytest.raises(Exception, match="Training failed"):
        train.run(killed)  # as if the driver had died: nothing is tidied up
    ended.set()
    killer.join()
    assert provenance.read(killed.artifact("heads")) is None
    training = tmp_path / "killed/training"
    newest = checkpoints.names(str(training))[-1]
    assert newest >= "step_00000200"
    (training / newest / "weight.safetensors").write_bytes(b"what a full disk leaves")
    with pytest.raises(
        UserError, match=r"holds a run that is not over.*train.learning_rate was 0.01, and is 0.1"
    ):
        train.run(changed(killed, learning_rate=0.1))

    train.run(killed)
    assert what_is_learnt(killed) == expected
    assert (tmp_path / "killed/heads" / WEIGHTS).read_bytes() == (
        tmp_path / "whole/heads" / WEIGHTS
    ).read_bytes()
    # The newest TensorBoard file is of the last start, which did not begin anew.
    assert min(scalars(tmp_path / "killed/heads")["loss"]) > 50

    # Defect D11: of the base there is nothing.
    saved = checkpoints.newest(str(tmp_path / "whole/training")).tensors
    names = [
        f"heads.{h}.{name}" for h in range(3) for name in ("0.linear.bias", "0.linear.weight", "1.weight")
    ]
    assert saved.keys() == {
        f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in names
    }

    # What the undisturbed run left behind.
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"base", "hidden", "heads", "training"}
    files = {"config.json", WEIGHTS, CURVE, "tensorboard", provenance.FILE}
    assert {path.name for path in (tmp_path / "whole/heads").iterdir()} == files
    assert expected[0]["learning_rate"] == pytest.approx(0.01 * 10 / 40)
    judged = [record["held_out"] for record in expected if "held_out" in record]
    assert [record["step"] for record in expected if "held_out" in record] == [150, 300, num_steps]
    assert judged[-1]["top1"] == [1.0, 1.0, 1.0]
    assert judged[-1]["tokens_per_step"]["chain"] == pytest.approx(10 / 3)  # 4, 4 and 2 of 10
    names = {"loss", "learning_rate", "epoch", "of", "positions_per_s", "memory_gib", "share_of_peak"}
    names |= {f"{what}/head_{head}" for what in ("head_loss", "top1", "top5") for head in range(3)}
    assert names <= scalars(tmp_path / "whole/heads").keys()
    record = provenance.read(whole.artifact("heads"))
    assert record is not None
    assert record["num_steps"] == num_steps
    assert record["num_positions"] == (160 - record["num_held_out"]) * (REPLY - 1)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_fewer_workers_go_on_with_what_more_have_left(ray_cluster: None, tmp_path: Path) -> None:
    """Told to stop, a run saves first; then another number of workers takes each position that is left, once."""
    config = write_run(tmp_path, num_rows=160, batch_size=4, logging_steps=1, num_workers=3)
    stop = threading.Thread(target=stop_at, args=(30, config))
    stop.start()
    with pytest.raises(SystemExit) as ended:
        train.run(config)
    stop.join()
    assert ended.value.code == 128 + signal.SIGTERM
    saved = checkpoints.newest(str(tmp_path / "training")).state
    assert saved["step"] == curve_of(config)[-1]["step"] >= 30

    fewer = changed(config, num_workers=2)
    train.run(fewer)
    curve = curve_of(config)
    assert [record["step"] for record in curve] == list(range(1, curve[-1]["step"] + 1))
    plan = State.of(saved, Job.of(fewer, corpus_of(fewer), None, "cpu")).plan
    steps_left = plan.num_steps + (config.train.epochs - plan.epoch - 1) * 200
    assert curve[-1]["step"] == saved["step"] + steps_left


def scalars(heads: Path) -> dict[str, list[int]]:
    """Steps of each curve in the newest TensorBoard file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    newest = max((heads / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    steps: dict[str, list[int]] = {}
    for event in EventFileLoader(str(newest)).Load():
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
    return steps


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_captured_computed_and_streamed_states_train_alike(
    tiny_base: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With soft labels, so that what the base says is the same as well. One actor streams to held-out rows and to both
    epochs: an 8 B base takes minutes to load."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (48,), generator=generator).tolist()
    rows = [
        {"id": f"{row}/0", "prompt_ids": [1, *torch.randint(6, 262, (length,), generator=generator).tolist()]}
        for row, length in enumerate(lengths)
    ]
    for part in range(3):
        table = pa.Table.from_pylist(rows[part::3], records.PROMPTS)
        parts.write(str(tmp_path / "capture/prompts/train"), parts.part_name(part), table)
    facts = {"splits": {"train": {"longest_prompt_tokens": 31}}}
    provenance.write(str(tmp_path / "capture/prompts"), {}, {}, **facts)

    def config_of(mode: str) -> RunConfig:
        training = {"num_workers": 1, "batch_size": 32, "epochs": 2, "dtype": "float32", "logging_steps": 1}
        training |= {"learning_rate": 0.01}
        raw = {
            "output": str(tmp_path / mode),
            "model": {"base": str(tiny_base), "dtype": "float32", "device": "cpu"},
            "data": {"train": "unused"},
            "distill": {"max_new_tokens": 12, "batch_size": 4},
            "hidden": {"mode": mode, "top_k": 4, "batch_tokens": 128},
            "train": {**training, "labels": "soft", "held_out": 0.1, "eval_steps": 5, "warmup_steps": 2},
        }
        return parse(RunConfig, raw, "test")

    configs = {mode: config_of(mode) for mode in ("capture", "compute", "stream")}
    distill.run(configs["capture"])
    for mode in ("compute", "stream"):
        shutil.copytree(tmp_path / "capture/distilled", tmp_path / mode / "distilled")
    for config in configs.values():
        hidden.run(config)
    train_without_ray(tmp_path, [configs["capture"], configs["compute"]], monkeypatch)
    ended, actors = threading.Event(), set[int]()
    watcher = threading.Thread(target=watch_actors, args=(actors, ended))
    watcher.start()
    train.run(configs["stream"])
    ended.set()
    watcher.join()
    assert len(actors) == 1
    curves = {mode: what_is_learnt(config) for mode, config in configs.items()}
    assert not parts.names(configs["stream"].artifact("hidden"))
    for mode in ("compute", "stream"):
        for record, expected in zip(curves[mode], curves["capture"], strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert record["head_loss"] == pytest.approx(expected["head_loss"], abs=1e-5)
            assert record["top5"] == expected["top5"]
            judged, judged_before = record.get("held_out", {}), expected.get("held_out", {})
            assert judged.get("tokens_per_step") == judged_before.get("tokens_per_step")
    losses = [record["loss"] for record in curves["capture"]]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.timeout(600)
def test_other_layouts_learn_with_sharded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 leaves empty weights behind for whoever forgets to gather them."""
    for name in ("shared", "lowrank"):
        (tmp_path / name).mkdir()
    settings: dict[str, Any] = {"zero_stage": 3, "epochs": 6, "warmup_steps": 5, "learning_rate": 0.02}
    heads: dict[str, Any] = {"layout": "shared", "num_layers": 2, "num_heads": 2}
    in_bf16 = {"states": "bfloat16", "dtype": "bfloat16", "gradient_accumulation_steps": 2}
    shared = write_run(tmp_path / "shared", heads=heads, **settings, **in_bf16)
    heads = {"layout": "lowrank", "rank": 6, "num_heads": 2, "draft_vocab_size": 18}
    lowrank = write_run(tmp_path / "lowrank", heads=heads, **settings)
    train_without_ray(tmp_path, [shared, lowrank], monkeypatch)

    trained, top1, head_loss = judged(shared)
    assert (trained.num_heads, trained.num_layers, trained.layout) == (2, 2, "shared")
    assert MedusaHeads.load(shared.artifact("heads"), dtype=None).dtype == torch.bfloat16
    assert min(top1) > 0.9
    assert curve_of(shared)[-1]["head_loss"] == pytest.approx(head_loss, abs=0.2)

    trained, top1, _ = judged(lowrank)
    token_map_M, coverage = corpus_of(lowrank).draft(lowrank.heads, V)
    assert (trained.layout, trained.rank, trained.draft_vocab_size) == ("lowrank", 6, 18)
    assert torch.equal(trained.token_map_M, token_map_M)
    assert 0.7 < coverage < 0.95
    # All that can be guessed is guessed, and what cannot is missed.
    assert top1 == pytest.approx([coverage] * 2, abs=0.06)
    assert curve_of(lowrank)[-1]["top1"] == pytest.approx(top1, abs=0.3)
    assert all(trained.low_rank_term(head).up.weight.norm() > 0 for head in range(2))


def judged(config: RunConfig) -> tuple[MedusaHeads, list[float], list[float]]:
    """The heads of a run, their top-1 and their mean losses on all that they were trained on."""
    trained = MedusaHeads.load(config.artifact("heads"))
    trained.init_from(train.read_output_layer(config.model))
    whole, one_H = everything_of(config), torch.ones(2)
    found = medusa_loss(trained, whole.hidden_NC.float(), whole.labels_NH, one_H, whole_cross_entropy)
    num_H = num_losses(trained, whole.labels_NH)
    return trained, (found.top1_H / found.num_labels_H).tolist(), (found.loss_sum_H / num_H).tolist()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_loss_that_is_not_finite_stops_all_ranks(ray_cluster: None, tmp_path: Path) -> None:
    """Retries would meet the same row again; and one rank that leaves alone would let the others wait."""
    config = write_run(tmp_path)
    table = parts.read(config.artifact("hidden"), "part-000001")
    rows = table.to_pylist()
    states = np.frombuffer(rows[4]["hidden"], np.float32).copy()
    states[0] = np.inf
    rows[4]["hidden"] = states.tobytes()
    parts.write(config.artifact("hidden"), "part-000001", records.hidden_table(rows, "float32", V))

    found = [
        (step, rank)
        for rank in range(2)
        for step, micro_batches in enumerate(steps_of(feed_of(config, rank), epoch_of(config)), 1)
        for batch in micro_batches
        if not batch.hidden_NC.isfinite().all()
    ]
    ((step, rank),) = found
    expected = (
        rf"step={step} rank={rank}: the loss is not finite, of rows {rows[4]['id']}\. Training stopped before"
    )
    with pytest.raises(UserError, match=expected):
        train.run(config)
    assert provenance.read(config.artifact("heads")) is None
    assert not (tmp_path / "heads" / WEIGHTS).exists()


def test_finished_heads_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path)
    heads = config.artifact("heads")
    seen = []
    monkeypatch.setattr(train.provenance, "is_complete", lambda *facts: seen.append(facts) or True)
    assert train.run(config) == heads
    (folder, settings, inputs) = seen[0]
    assert folder.endswith("/heads")
    assert settings["train"]["epochs"] == 2
    assert inputs["hidden"] == provenance.digest(config.artifact("hidden"))
