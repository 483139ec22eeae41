"""Captured and computed states are the same states, so that either can train the heads."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from medusa_ray import hidden, parts, provenance, records
from medusa_ray.config import RunConfig, UserError
from medusa_ray.medusa.engine import Engine

PROMPTS = [[1, 4, 30 + i, *range(40, 40 + 7 * i), 2, 5] for i in range(6)]


def config_of(folder: Path, base: Path, batch_tokens: int = 64) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": str(folder),
            "model": {"base": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": "-"},
            "hidden": {"mode": "compute", "batch_tokens": batch_tokens},
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


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_passes_hold_every_row_once_and_few_enough_tokens(lengths: list[int], batch_tokens: int) -> None:
    groups = list(hidden.passes(lengths, batch_tokens))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= batch_tokens


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_computed_states_are_the_captured_ones(tiny_base: Path, tmp_path: Path, batch_tokens: int) -> None:
    """With every padding: rows alone, a few together, all together."""
    captured = distill_by_hand(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, batch_tokens)
    body = hidden.Body(config, str(tiny_base), "cpu", f"{tmp_path}/distilled", f"{tmp_path}/hidden")
    for name in ("part-000000", "part-000001"):
        body({"part": name})
    rows = rows_of(config)
    assert [row["id"] for row in rows] == ["0/0/0", "3/0/0", "4/0/0", "5/0/0"]
    for row, captured_TC in zip(rows, captured, strict=True):
        computed_TC = torch.frombuffer(bytearray(row["hidden"]), dtype=torch.float32).view(-1, 32)
        torch.testing.assert_close(computed_TC, captured_TC, atol=1e-4, rtol=0)  # fp32, two layers


def test_states_are_what_the_output_layer_takes(tiny_base: Path, tmp_path: Path) -> None:
    """States before the last norm would agree in shape and train worse."""
    distill_by_hand(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    body = hidden.Body(config, str(tiny_base), "cpu", f"{tmp_path}/distilled", f"{tmp_path}/hidden")
    body({"part": "part-000001"})
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for row in rows_of(config):
        state_TC = torch.frombuffer(bytearray(row["hidden"]), dtype=torch.float32).view(-1, 32)
        logits_TV = model(torch.tensor([row["input_ids"]])).logits[0, row["position"]]
        torch.testing.assert_close(model.lm_head(state_TC), logits_TV, atol=1e-4, rtol=0)  # fp32, two layers


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
    parts.begin(config.artifact("hidden"), provenance.digest(config.artifact("distilled")))
    body = hidden.Body(config, str(tiny_base), "cpu", f"{tmp_path}/distilled", f"{tmp_path}/hidden")
    body({"part": "part-000001"})
    written = (tmp_path / "hidden" / "part-000001.parquet").stat().st_mtime_ns

    assert hidden.run(config) == config.artifact("hidden")
    assert (tmp_path / "hidden" / "part-000001.parquet").stat().st_mtime_ns == written
    assert [row["id"] for row in rows_of(config)] == ["0/0/0", "3/0/0", "4/0/0", "5/0/0"]
    record = provenance.read(config.artifact("hidden"))
    assert record["rows"] == {"in": 6, "good": 4, "errors": {"error in distilled": 1, "too short": 1}}
    assert record["num_positions"] == 4 * 8
