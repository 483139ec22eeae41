"""Training of the heads: every position once per epoch, in an order that a resumed run repeats."""

import json
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_ray import parts, provenance, records, train
from medusa_ray.config import HeadsConfig, ModelConfig, RunConfig, TrainConfig, UserError, parse
from medusa_ray.medusa.heads import WEIGHTS, MedusaHeads
from medusa_ray.medusa.loss import IGNORED, medusa_loss, whole_cross_entropy

V = 24  # and the hidden size: a state is its token, one-hot
PROMPT, REPLY = 3, 11  # so 10 positions a row, and 9 of them with a label
STEP = 7  # a reply counts on in steps of 7


def write_run(folder: Path, num_rows: int = 60, states: str = "float32", **settings: Any) -> RunConfig:
    """A base and hidden/ that heads can learn from: each token follows from the one before."""
    (folder / "base").mkdir()
    output_VC = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    save_file({"lm_head.weight": output_VC}, folder / "base/model.safetensors")
    rows = []
    for row in range(num_rows):
        ids = [(row + STEP * place) % V for place in range(PROMPT + REPLY)]
        states_NC = 4 * torch.eye(V, dtype=getattr(torch, states))[ids[PROMPT - 1 : -2]]
        raw = states_NC.view(torch.uint8).numpy().tobytes()
        rows.append(records.hidden_row(f"{row}/0/0", ids[:PROMPT], ids[PROMPT:], raw))
    for part in range(3):
        table = records.hidden_table(rows[part::3], states, V)
        parts.write(str(folder / "hidden"), parts.part_name(part), table)
    provenance.write(str(folder / "hidden"), {}, {})
    raw_config = {
        "output": str(folder),
        "model": {"base": str(folder / "base"), "device": "cpu"},
        "data": {"train": "unused"},
        "heads": settings.pop("heads", {}),
        "train": {"num_workers": 2, "batch_size": 8, "epochs": 2, "dtype": "float32", **settings},
    }
    return parse(RunConfig, raw_config, "test")


def job_of(config: RunConfig) -> train.Job:
    hidden, output = config.artifact("hidden"), config.artifact("heads")
    num_positions = train.survey(hidden, config, V)
    base, token_map_M = config.model.base, train.choose_draft(hidden, config.heads, V)[0]
    return train.Job(
        hidden, output, base, "cpu", None, num_positions, token_map_M, config.heads, config.train
    )


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_every_position_belongs_to_one_rank(dtype: str, num_workers: int, tmp_path: Path) -> None:
    """A state beside another position's labels still trains; only acceptance drops."""
    job = job_of(write_run(tmp_path, states=dtype, num_workers=num_workers))
    shares = [train.load_share(job, rank) for rank in range(num_workers)]
    sizes = [len(labels_NH) for _, labels_NH in shares]
    assert sum(sizes) == job.num_positions == 60 * (REPLY - 1)
    assert max(sizes) - min(sizes) <= 1
    for hidden_NC, labels_NH in shares:
        assert hidden_NC.dtype == getattr(torch, dtype)
        token_N = hidden_NC.argmax(dim=1)
        for head in range(3):
            known_N = labels_NH[:, head] != IGNORED
            expected_N = (token_N + STEP * (head + 2)) % V
            assert torch.equal(labels_NH[known_N, head], expected_N[known_N])
    ignored = [
        sum((labels_NH[:, head] == IGNORED).sum().item() for _, labels_NH in shares) for head in range(3)
    ]
    assert ignored == [0, 60, 120]  # the last position of a row has a label for head 0 alone


def test_an_epoch_takes_every_position_and_then_some_again(tmp_path: Path) -> None:
    job = job_of(write_run(tmp_path, gradient_accumulation_steps=3))
    assert job.steps_per_epoch == 13  # 600 positions in steps of 2 x 3 x 8
    order = train.order_of(job, epoch=0, rank=1, num_own=300)
    assert order.shape == (13, 3, 8)
    counts = torch.bincount(order.flatten(), minlength=300)
    assert counts.min() == 1
    assert counts.max() == 2


def test_the_order_follows_from_seed_epoch_and_rank(tmp_path: Path) -> None:
    job = job_of(write_run(tmp_path))
    order = train.order_of(job, 1, 1, 300)
    assert torch.equal(order, train.order_of(job, 1, 1, 300))
    assert not torch.equal(order, train.order_of(job, 0, 1, 300))
    assert not torch.equal(order, train.order_of(job, 1, 0, 300))


def test_fewer_positions_than_a_batch_still_make_a_step(tmp_path: Path) -> None:
    job = job_of(write_run(tmp_path, num_rows=1, batch_size=512))
    assert job.num_steps == 2
    assert set(train.order_of(job, 0, 0, 5).flatten().tolist()) == {0, 1, 2, 3, 4}


def test_states_that_do_not_fill_their_positions_are_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, num_rows=3)
    row = records.hidden_row("9/0/0", [1, 2], [3, 4, 5], bytes(4 * V))
    parts.write(config.artifact("hidden"), "part-000009", records.hidden_table([row], "float32", V))
    with pytest.raises(ValueError, match=r"row 9/0/0: 96 bytes of states, but 2 positions of 24 float32"):
        train.load_share(job_of(config), 0)


def test_the_draft_vocabulary_is_what_labels_name_most(tmp_path: Path) -> None:
    """Tokens of the prompt are no labels, nor is the first of the reply, which the base itself says."""
    config = write_run(tmp_path, num_rows=0, heads={"num_heads": 2, "draft_vocab_size": 3})
    for number, reply in enumerate([[9, 5, 5, 5, 7, 20], [9, 9, 7, 20]]):
        row = records.hidden_row(f"{number}/0/0", [9, 9, 9], reply, bytes(4 * V * (len(reply) - 1)))
        parts.write(config.artifact("hidden"), f"part-{number:06}", records.hidden_table([row], "float32", V))
    # Labels of head 0: 5 5 5 7 20 and 9 7 20; of head 1: 5 5 7 20 and 7 20. The base's own are 9 and 9.
    token_map_M, coverage = train.choose_draft(config.artifact("hidden"), config.heads, V)
    assert token_map_M.tolist() == [5, 7, 20]
    assert coverage == pytest.approx(13 / 14)
    assert train.choose_draft(config.artifact("hidden"), HeadsConfig(), V) == (None, 1.0)
    too_many = HeadsConfig(draft_vocab_size=V + 1)
    with pytest.raises(UserError, match=f"draft_vocab_size is {V + 1}, but the base has a vocabulary of {V}"):
        train.choose_draft(config.artifact("hidden"), too_many, V)


# ------------------------------------------------------------------------------------------------ wrong input


def test_hidden_states_must_be_finished(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "hidden" / provenance.FILE).unlink()
    with pytest.raises(UserError, match="hidden is not finished"):
        train.run(config)


@pytest.mark.parametrize("reply", [[4], [4, 5]])
def test_rows_without_a_label_stop_the_run_before_training(reply: list[int], tmp_path: Path) -> None:
    config = write_run(tmp_path, num_rows=0)
    row = records.hidden_row("0/0/0", [1, 2, 3], reply, bytes(4 * V * (len(reply) - 1)))
    parts.write(config.artifact("hidden"), "part-000000", records.hidden_table([row], "float32", V))
    expected = rf"has {len(reply) - 1} positions with a label .* train.num_workers=2"
    with pytest.raises(UserError, match=expected):
        train.run(config)


def test_hidden_states_of_another_base_are_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with pytest.raises(UserError, match=r"part-000000.parquet has hidden_size=24 .* has a hidden size of 99"):
        train.survey(config.artifact("hidden"), config, 99)


def model_config(folder: Path) -> ModelConfig:
    return ModelConfig(base=str(folder))


@pytest.mark.parametrize(
    "names", [["lm_head.weight", "model.embed_tokens.weight"], ["model.embed_tokens.weight"]]
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_output_layer_is_found_where_the_base_keeps_it(
    names: list[str], is_sharded: bool, tmp_path: Path
) -> None:
    """Tied embeddings are stored once, large models in several files."""
    tensors = {name: torch.full((V, 2), float(number)) for number, name in enumerate(names)}
    if is_sharded:
        for number, name in enumerate(names):
            save_file({name: tensors[name]}, tmp_path / f"{number}.safetensors")
        index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(names)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(train.read_output_layer(model_config(tmp_path)), tensors[names[0]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({}, "has no model.safetensors"), ({"wte": torch.zeros(2)}, r"has tensors \['wte'\]...")],
)
def test_a_base_without_an_output_layer_is_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        train.read_output_layer(model_config(tmp_path))


# ------------------------------------------------------------------------------------------------ schedule


def test_the_learning_rate_warms_up_and_falls() -> None:
    def rates(shape: str) -> list[float]:
        config = TrainConfig(learning_rate=1.0, warmup_steps=4, lr_scheduler=shape)
        return [round(train.learning_rate(step, 12, config), 3) for step in range(12)]

    warm_up = [0.25, 0.5, 0.75, 1.0]
    assert rates("constant") == warm_up + [1.0] * 8
    assert rates("linear") == [*warm_up, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine") == [*warm_up, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]


def test_initial_weights_follow_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that begin apart are made equal by DeepSpeed; runs are not."""
    config = write_run(tmp_path, num_rows=1, heads={"layout": "lowrank"}, num_workers=1)
    monkeypatch.setattr(train.ray, "get", lambda _: train.read_output_layer(config.model))

    def initial(seed: int) -> torch.Tensor:
        job = replace(job_of(config), train=config.train.model_copy(update={"seed": seed}))
        return train.HeadTrainer(job).heads.low_rank_term(1).down.weight

    assert torch.equal(initial(3), initial(3))
    assert not torch.equal(initial(3), initial(4))


def test_deepspeed_is_told_all_that_the_config_says() -> None:
    config = TrainConfig(batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7, zero_stage=2)
    found = train.deepspeed_config(config)
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 5
    assert found["gradient_clipping"] == 0.7
    assert found["zero_optimization"] == {"stage": 2}
    assert found["bf16"] == {"enabled": True}


def test_lines_of_the_curve_are_logged_as_they_are_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "medusa_ray")
    record = {"step": 5, "loss": 1.23456, "top1": [0.5, 0.25]}
    with train.relayed(f"{tmp_path}/{train.CURVE}", 10):
        (tmp_path / train.CURVE).write_text(json.dumps(record) + "\n" + '{"step": 6, "lo')
    assert caplog.messages == ["stage=train step=5 of=10 loss=1.235 top1=0.500,0.250"]


# ------------------------------------------------------------------------------------------------ with Ray


def curve_of(config: RunConfig) -> list[dict[str, Any]]:
    return train.read_curve(f"{config.artifact('heads')}/{train.CURVE}")


def kill_a_worker_at(step: int, config: RunConfig, ended: threading.Event) -> None:
    """SIGKILL for the younger training process of this test's cluster, once the curve is that far."""
    while not ended.wait(0.02):
        curve = curve_of(config)
        if curve and curve[-1]["step"] >= step:
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
            max(workers, key=psutil.Process.create_time).send_signal(signal.SIGKILL)
            return


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_and_ends_with_the_same_heads(ray_cluster: None, tmp_path: Path) -> None:
    """The same loss at every step: the order of rows, the optimizer and the schedule have all come back."""
    settings = {"batch_size": 4, "save_steps": 100, "learning_rate": 0.01, "max_failures": 0}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (write_run(tmp_path / name, num_rows=160, **settings) for name in ("whole", "killed"))

    assert train.run(whole) == whole.artifact("heads")
    expected = curve_of(whole)
    assert [record["step"] for record in expected] == list(range(10, 401, 10))

    ended = threading.Event()
    killer = threading.Thread(target=kill_a_worker_at, args=(250, killed, ended))
    killer.start()
    with pytest.raises(Exception, match="Training failed"):
        train.run(killed)  # as if the driver had died: nothing is tidied up
    ended.set()
    killer.join()
    assert provenance.read(killed.artifact("heads")) is None
    assert list((tmp_path / "killed/training").glob("*/step_*"))

    train.run(killed)
    assert curve_of(killed) == [
        {key: pytest.approx(value, abs=1e-6) for key, value in record.items()} for record in expected
    ]
    tensors = load_file(tmp_path / "whole/heads" / WEIGHTS)
    torch.testing.assert_close(load_file(tmp_path / "killed/heads" / WEIGHTS), tensors, rtol=0, atol=1e-6)
    # The newest TensorBoard file is of the last start, which did not begin anew.
    assert min(scalars(tmp_path / "killed/heads")["loss"]) > 100

    # What the undisturbed run left behind.
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"base", "hidden", "heads"}
    files = {"config.json", WEIGHTS, train.CURVE, "tensorboard", provenance.FILE}
    assert {path.name for path in (tmp_path / "whole/heads").iterdir()} == files
    assert expected[-1]["top1"] == [1.0, 1.0, 1.0]
    assert expected[0]["learning_rate"] == pytest.approx(0.01 * 10 / 40)
    assert scalars(tmp_path / "whole/heads").keys() == {
        "loss", "learning_rate", *(f"{what}/head_{head}" for what in ("loss", "top1") for head in range(3))
    }  # fmt: skip
    record = provenance.read(whole.artifact("heads"))
    assert record is not None
    assert (record["num_steps"], record["num_positions"], record["num_repeated_per_epoch"]) == (400, 1600, 0)


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
def test_shared_heads_learn_in_bf16_with_sharded_weights(ray_cluster: None, tmp_path: Path) -> None:
    """ZeRO-3 leaves empty weights behind for whoever forgets to gather them."""
    heads = {"layout": "shared", "num_layers": 2, "num_heads": 2}
    training = {"zero_stage": 3, "dtype": "bfloat16", "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    config = write_run(tmp_path, states="bfloat16", epochs=6, heads=heads, warmup_steps=5, **training)
    train.run(config)
    trained = MedusaHeads.load(config.artifact("heads"))
    assert (trained.num_heads, trained.num_layers, trained.layout) == (2, 2, "shared")
    assert {tensor.dtype for tensor in load_file(tmp_path / "heads" / WEIGHTS).values()} == {torch.bfloat16}
    trained.init_from(train.read_output_layer(config.model))

    hidden_NC, labels_NH = train.load_share(job_of(config), 0)
    result = medusa_loss(trained, hidden_NC.float(), labels_NH, torch.ones(2), whole_cross_entropy)
    assert (result.top1_H / result.num_labels_H).min() > 0.9
    expected = (result.loss_sum_H / result.num_labels_H).tolist()
    assert curve_of(config)[-1]["head_loss"] == pytest.approx(expected, abs=0.2)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_low_rank_heads_learn_a_part_of_the_vocabulary(ray_cluster: None, tmp_path: Path) -> None:
    heads = {"layout": "lowrank", "rank": 6, "num_heads": 2, "draft_vocab_size": 18}
    config = write_run(tmp_path, epochs=6, heads=heads, warmup_steps=5, learning_rate=0.02, zero_stage=3)
    train.run(config)
    trained = MedusaHeads.load(config.artifact("heads"))
    assert (trained.layout, trained.rank, trained.draft_vocab_size) == ("lowrank", 6, 18)
    job = job_of(config)
    assert torch.equal(trained.token_map_M, job.token_map_M)
    output_VC = train.read_output_layer(config.model)
    trained.init_from(output_VC)

    hidden_NC, labels_NH = train.load_share(job, 0)
    result = medusa_loss(trained, hidden_NC, labels_NH, torch.ones(2), whole_cross_entropy)
    top1 = (result.top1_H / result.num_labels_H).tolist()
    coverage = provenance.read(config.artifact("heads"))["draft_coverage"]
    assert 0.7 < coverage < 0.95
    # All that can be guessed is guessed, and what cannot is missed.
    assert top1 == pytest.approx([coverage] * 2, abs=0.06)
    assert curve_of(config)[-1]["top1"] == pytest.approx(top1, abs=0.3)
    assert all(trained.low_rank_term(head).up.weight.norm() > 0 for head in range(2))


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

    job = job_of(config)
    place = (20 + 4) * (REPLY - 1)  # parts hold 20 rows each
    rank, own = place % 2, place // 2
    order = train.order_of(job, 0, rank, 300)
    step = 1 + int((order == own).any(dim=2).any(dim=1).nonzero()[0])
    with pytest.raises(UserError, match=rf"step={step} rank={rank}: the loss is not finite"):
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
