"""Captured and computed states are the same states, so that either can train the heads."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_ray import hidden, parts, provenance, records
from medusa_ray.config import RunConfig, UserError
from medusa_ray.distill.generate import Generator
from medusa_ray.medusa.engine import Engine
from medusa_ray.states import settings_of

PROMPTS = [[1, 4, 30 + i, *range(40, 40 + 7 * i), 2, 5] for i in range(6)]


def config_of(
    folder: Path,
    base: Path,
    batch_tokens: int = 64,
    mode: str = "compute",
    loss_on: str = "last",
    top_k: int = 0,
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": str(folder),
            "model": {"base": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": "-", "loss_on": loss_on},
            "distill": {"max_new_tokens": 9},
            "hidden": {"mode": mode, "batch_tokens": batch_tokens, "top_k": top_k},
        }
    )


def distill_by_hand(folder: Path, base: Path) -> list[torch.Tensor]:
    """Two parts of distilled rows, an error and a reply of one token among them; returns captured states."""
    engine = Engine.load(str(base), max_total_tokens=256)
    done = engine.generate(PROMPTS, max_new_tokens=9, ignore_eos=True, capture_hidden=True)
    rows: list[dict[str, Any]] = [
        {"id": f"{i}/0/0", "prompt_ids": prompt, "reply_ids": completion.token_ids, "finish_reason": "length"}
        for i, (prompt, completion) in enumerate(zip(PROMPTS, done, strict=True))
    ]
    rows[1] |= {"reply_ids": [], "finish_reason": None, "error": "too long: very"}
    rows[2] |= {"reply_ids": rows[2]["reply_ids"][:1]}
    for index, some in enumerate((rows[:4], rows[4:])):
        table = pa.Table.from_pylist(some, records.DISTILLED)
        parts.write(f"{folder}/distilled", parts.part_name(index), table)
    provenance.write(f"{folder}/distilled", {}, {})
    return [done[i].hidden_TC[:-1] for i in (0, 3, 4, 5)]


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    folder = config.artifact("hidden")
    return [row for name in parts.names(folder) for row in parts.read(folder, name).to_pylist()]


def compute(config: RunConfig, *names: str) -> list[dict[str, Any]]:
    """Rows of hidden/ of some parts, by the stage's own worker."""
    folders = config.artifact("distilled"), config.artifact("hidden")
    worker = hidden.Computer(config, config.model.base, "cpu", *folders)
    for name in names:
        worker({"part": name})
    return rows_of(config)


def states_of(row: dict[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(row["hidden"]), dtype=torch.float32).view(-1, 32)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_computed_states_are_the_captured_ones(tiny_base: Path, tmp_path: Path, batch_tokens: int) -> None:
    """With every packing: rows alone, a few together, all together."""
    captured = distill_by_hand(tmp_path, tiny_base)
    rows = compute(config_of(tmp_path, tiny_base, batch_tokens), "part-000000", "part-000001")
    assert [row["id"] for row in rows] == ["0/0/0", "3/0/0", "4/0/0", "5/0/0"]
    for row, captured_TC in zip(rows, captured, strict=True):
        torch.testing.assert_close(states_of(row), captured_TC, atol=1e-4, rtol=0)  # fp32, two layers


def test_states_are_what_the_output_layer_takes(tiny_base: Path, tmp_path: Path) -> None:
    """States before the last norm would agree in shape and train worse."""
    distill_by_hand(tmp_path, tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for row in compute(config_of(tmp_path, tiny_base), "part-000001"):
        logits_TV = model(torch.tensor([row["input_ids"]])).logits[0, row["position"]]
        torch.testing.assert_close(
            model.lm_head(states_of(row)), logits_TV, atol=1e-4, rtol=0
        )  # fp32, two layers


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_a_labels_teacher_is_the_distribution_that_it_was_drawn_from(
    loss_on: str, tiny_base: Path, tmp_path: Path
) -> None:
    """One place off, soft labels would teach head 0 what the base says itself."""
    distill_by_hand(tmp_path, tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for row in compute(config_of(tmp_path, tiny_base, loss_on=loss_on, top_k=4), "part-000001"):
        labels = [i for i, may_be in enumerate(row["label_mask"]) if may_be]
        num_tokens, num_reply = len(row["input_ids"]), 9
        assert labels == list(range(1 if loss_on == "all" else num_tokens - num_reply, num_tokens))
        assert row["position"] == list(range(labels[0] - 1, num_tokens - 2))
        best = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).topk(4)
        before = [label - 1 for label in labels]
        assert torch.tensor(row["teacher_ids"]).view(-1, 4).equal(best.indices[before].int())
        logprobs = torch.tensor(row["teacher_logprobs"]).view(-1, 4)
        torch.testing.assert_close(logprobs, best.values[before], atol=1e-4, rtol=0)
        # Greedy replies are what the teacher finds likeliest.
        assert row["teacher_ids"][::4][-num_reply:] == row["input_ids"][-num_reply:]


def test_captured_rows_are_the_computed_ones_column_by_column(tiny_base: Path, tmp_path: Path) -> None:
    """So that training can change from one to the other and be the same training."""
    rows = [
        {
            "id": f"{i}/0",
            "prompt_ids": prompt if i != 2 else [],
            "error": "too long: very" if i == 2 else None,
        }
        for i, prompt in enumerate(PROMPTS)
    ]
    parts.write(f"{tmp_path}/prompts/train", "part-000000", pa.Table.from_pylist(rows, records.PROMPTS))
    config = config_of(tmp_path, tiny_base, top_k=3)
    folders = [config.artifact(name) for name in ("prompts", "distilled")]
    captured = f"{tmp_path}/captured"
    generator = Generator(config, str(tiny_base), "cpu", 60, *folders, captured, None)
    generator({"part": "part-000000", "source": "part-000000", "start": 0, "length": 6})
    compute(config, "part-000000")
    tables = [parts.read(folder, "part-000000") for folder in (captured, config.artifact("hidden"))]
    assert tables[0].schema.equals(tables[1].schema, check_metadata=True)
    for name in set(records.HIDDEN.names) - {"hidden", "teacher_logprobs"}:
        assert tables[0][name].to_pylist() == tables[1][name].to_pylist(), name
    for first, second in zip(*(table.to_pylist() for table in tables), strict=True):
        torch.testing.assert_close(states_of(first), states_of(second), atol=1e-4, rtol=0)
        logprobs = (torch.tensor(row["teacher_logprobs"]) for row in (first, second))
        torch.testing.assert_close(*logprobs, atol=1e-4, rtol=0)


def test_more_teachers_than_tokens_are_the_users_mistake(tiny_base: Path, tmp_path: Path) -> None:
    distill_by_hand(tmp_path, tiny_base)
    with pytest.raises(UserError, match=r"hidden\.top_k is 263, but the base has 262 tokens"):
        compute(config_of(tmp_path, tiny_base, top_k=263), "part-000000")


def test_streaming_counts_and_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """No base is loaded and no Ray started; training runs the base."""
    distill_by_hand(tmp_path, tiny_base)
    config = config_of(tmp_path, tmp_path / "no base", mode="stream", loss_on="all")
    hidden.run(config)
    assert parts.names(config.artifact("hidden")) == []
    record = provenance.read(config.artifact("hidden"))
    # Where prompts are labels too, a reply of one token leaves some.
    assert record["rows"] == {"in": 6, "good": 5, "errors": {"error in distilled": 1}}
    distilled = (row for name in parts.names(f"{tmp_path}/distilled") for row in
                 parts.read(f"{tmp_path}/distilled", name).to_pylist() if not row["error"])  # fmt: skip
    assert record["num_positions"] == sum(len(row["prompt_ids"] + row["reply_ids"]) - 2 for row in distilled)
    assert not provenance.is_complete(
        config.artifact("hidden"), settings_of(config_of(tmp_path, tiny_base)), {}
    )


def test_distilled_rows_that_are_not_finished_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distilled is not finished\. Run the distill stage"):
        hidden.run(config_of(tmp_path, tiny_base))


@pytest.mark.ray
def test_missing_parts_are_computed_and_captured_ones_are_left(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    distill_by_hand(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    # As distillation leaves it when it captures; here one part is missing.
    inputs = {"distilled": provenance.digest(config.artifact("distilled"))}
    parts.begin(config.artifact("hidden"), provenance.key(settings_of(config), inputs))
    compute(config, "part-000001")
    written = (tmp_path / "hidden" / "part-000001.parquet").stat().st_mtime_ns

    assert hidden.run(config) == config.artifact("hidden")
    assert (tmp_path / "hidden" / "part-000001.parquet").stat().st_mtime_ns == written
    assert [row["id"] for row in rows_of(config)] == ["0/0/0", "3/0/0", "4/0/0", "5/0/0"]
    record = provenance.read(config.artifact("hidden"))
    assert record["rows"] == {"in": 6, "good": 4, "errors": {"error in distilled": 1, "too short": 1}}
    assert record["num_positions"] == 4 * 8
