"""The small base: its tokens, the order and loss of its training, and the one that ships with the package."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from medusa_ray import provenance
from medusa_ray.chat import Chat
from medusa_ray.config import UserError
from medusa_ray.demo import quality, train_base
from medusa_ray.demo.chats import chats

MESSAGES = [
    {"role": "system", "content": "Translate."},
    {"role": "user", "content": "Which code is QX-417?"},
    {"role": "assistant", "content": "SELECT 1;"},
    {"role": "user", "content": "And naïve 日本?"},
    {"role": "assistant", "content": "SELECT 'é';"},
]
TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 48}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_base.train_tokenizer(chats("train", 300))


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> dict[str, np.ndarray]:
    train_base.write_rows(chats("train", 40), tokenizer, tmp_path / "rows.npz")
    return dict(np.load(tmp_path / "rows.npz"))


def test_messages_survive_the_round_trip_through_token_ids(tokenizer: PreTrainedTokenizerFast):
    ids = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert tokenizer.decode(ids) == (
        "<|begin|><|system|>Translate.<|end|>"
        "<|user|>Which code is QX-417?<|end|><|assistant|>SELECT 1;<|end|>"
        "<|user|>And naïve 日本?<|end|><|assistant|>SELECT 'é';<|end|>"
    )
    assert ids.count(tokenizer.bos_token_id) == 1


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast):
    tokens = tokenizer.tokenize("over 41796 and 'QX-417'")
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("41796417")


def test_the_mask_covers_each_answer_with_its_end_and_nothing_else(tokenizer: PreTrainedTokenizerFast):
    """A mask without the end token trains a model that never stops."""
    rendered = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    runs = [[token for token, _ in run] for mine, run in itertools.groupby(pairs, lambda p: p[1]) if mine]
    assert [tokenizer.decode(run) for run in runs] == ["SELECT 1;<|end|>", "SELECT 'é';<|end|>"]


def test_the_prompt_of_a_chat_is_the_beginning_of_the_whole(tokenizer: PreTrainedTokenizerFast):
    chat = Chat(tokenizer)
    whole = tokenizer.apply_chat_template(MESSAGES[:3], return_dict=False)
    assert chat.prompt_ids(MESSAGES[:2]) + chat.reply_ids(MESSAGES[:2], "SELECT 1;") == whole


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match="critic"):
        Chat(tokenizer).prompt_ids([{"role": "critic", "content": "42"}])


def test_chats_without_an_answer_or_too_long_are_left_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    good = chats("train", 3)
    long = {"messages": [{"role": "user", "content": "why " * 2000}, *MESSAGES[2:3]]}
    train_base.write_rows([*good, long, {"messages": MESSAGES[:2]}], tokenizer, tmp_path / "rows.npz")
    assert len(np.load(tmp_path / "rows.npz")["starts"]) == len(good) + 1
    with pytest.raises(UserError, match="none of the 1 chats"):
        train_base.write_rows([long], tokenizer, tmp_path / "none.npz")


def test_every_row_is_seen_once_an_epoch_in_an_order_that_only_the_seed_changes():
    lengths = np.random.default_rng(0).integers(50, 200, size=300)
    order = [batch.tolist() for batch in train_base.batches(lengths, 8, 608, seed=0)]
    assert order == [batch.tolist() for batch in train_base.batches(lengths, 8, 608, seed=0)]
    assert order != [batch.tolist() for batch in train_base.batches(lengths, 8, 608, seed=1)]
    first, second = (list(itertools.chain(*epoch)) for epoch in (order[:38], order[38:]))
    assert sorted(first) == sorted(second) == list(range(300))
    assert first != second


def test_batches_are_of_like_length():
    lengths = np.random.default_rng(0).integers(50, 200, size=4096)
    spreads = [np.ptp(lengths[batch]) for batch in train_base.batches(lengths, 16, 4096, seed=0)]
    assert np.mean(spreads) < 10


def test_the_loss_of_a_batch_is_the_mean_over_the_tokens_of_its_rows(rows: dict[str, np.ndarray]):
    """Padding that leaks into the loss or into attention still trains, only worse."""
    model = train_base.build_model(replace(train_base.RECIPES["0.9m"], **TINY))
    batch = np.array([0, 1, 2, 3])
    together = train_base.losses(model, *train_base.collate(rows, batch), autocast=False)
    for part, is_reply in enumerate((True, False)):
        total, num_tokens = 0.0, 0
        for row in batch:
            span = slice(rows["starts"][row], rows["starts"][row + 1])
            num = int((rows["is_reply"][span][1:] == is_reply).sum())
            alone = train_base.losses(model, *train_base.collate(rows, np.array([row])), autocast=False)
            total, num_tokens = total + alone[part].item() * num, num_tokens + num
        assert together[part].item() == pytest.approx(total / num_tokens, abs=1e-5)  # fp32, loss of about 7


def test_the_learning_rate_rises_then_falls_to_a_twentieth():
    recipe = train_base.RECIPES["8m"]
    rates = [train_base.learning_rate(step, 1000, recipe) for step in (1, 100, 550, 1000)]
    assert rates == pytest.approx([recipe.learning_rate * share for share in (0.01, 1.0, 0.525, 0.05)])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_base_is_trained_and_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first call dies between training and export; the second must not train again."""
    out = tmp_path / "base"
    rows = chats("train", 64)

    def train() -> dict[str, Any]:
        return train_base.train_base(rows, str(out), "0.9m", num_samples=480, warmup_steps=5, **TINY)

    with monkeypatch.context() as patch:
        patch.setattr(train_base, "export", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train()
    assert provenance.read(str(out)) is None
    record = train()

    curve = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [50, 60]
    assert curve[-1]["loss"] < curve[0]["loss"] < 7
    assert record["loss"] == curve[-1]["loss"]
    assert not (out / "training").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id == 2

    monkeypatch.setattr(train_base, "TorchTrainer", None)  # a third call that tried to train would fail
    assert train() == record


def test_the_shipped_base_is_small_and_whole():
    files = [path for path in quality.BASE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    model = AutoModelForCausalLM.from_pretrained(quality.BASE)
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 1024
    assert not model.config.tie_word_embeddings
    record = provenance.read(str(quality.BASE))
    assert record is not None
    assert {"command", "config", "versions", "num_tokens", "loss", "quality"} <= set(record)


def test_the_shipped_base_answers_held_out_questions_exactly():
    """60 chats of about 0.95 fall under 0.8 once in a million draws."""
    rows = chats("test", 60, seed=1)
    result = quality.score(rows, quality.greedy_replies(str(quality.BASE), rows))
    assert result["n"] == 60
    assert result["exact_match"] >= 0.8
    assert result["execution_accuracy"] >= result["exact_match"]


def test_scores_count_exact_and_equivalent_replies():
    rows = chats("test", 4)
    answers = [row["messages"][-1]["content"] for row in rows]
    result = quality.score(rows, [answers[0], answers[1].removesuffix(";"), "SELECT 1;", ""])
    assert result == {"exact_match": 0.25, "execution_accuracy": 0.5, "n": 4}
