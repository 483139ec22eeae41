"""States of a packed pass are those of each sequence alone: a mask with a hole still trains, and only acceptance drops.

The oracle is plain transformers, one sequence at a time, without mask, positions or packing.
"""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.states import PackedBase, hosts, logits_of, packs, teacher

VOCAB = 99
ALIKE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
OWN_WORDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**ALIKE)),
        # Every other layer sees four tokens back; scores and logits are capped.
        "gemma": lambda: Gemma2ForCausalLM(
            Gemma2Config(**ALIKE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**OWN_WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**ALIKE, logits_scaling=7.0)),
        # Its biases follow the place in the row, whatever the positions say: it cannot be packed.
        "bloom": lambda: BloomForCausalLM(BloomConfig(**OWN_WORDS, hidden_size=32, n_layer=2, n_head=4)),
    }
    return models[family]().eval()


FAMILIES = ["llama", "gemma", "gpt2", "granite", "bloom"]


def draw(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def alone(model: PreTrainedModel, sequence: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output layer receives and what the model makes of it, [T, C] and [T, V]."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    logits_TV = model(torch.tensor([sequence])).logits[0]
    handle.remove()
    return seen[0], logits_TV


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pass_tokens", [1, 40, 10_000])
def test_packed_states_are_those_of_each_sequence_alone(family: str, pass_tokens: int) -> None:
    sequences = draw([20, 3, 7, 9, 1, 12, 20, 5])
    positions = [[*range(0, len(sequence), 2)] for sequence in sequences]
    positions[2] = []
    base = PackedBase(model_of(family), pass_tokens)
    assert base.is_packable == (family != "bloom")
    states = base.states(sequences, positions)
    for sequence, own, found_NC in zip(sequences, positions, states, strict=True):
        expected_NC = alone(model_of(family), sequence)[0][own]
        torch.testing.assert_close(found_NC, expected_NC, atol=1e-5, rtol=0)


def test_a_packed_pass_has_next_to_no_padding() -> None:
    """D6 of the original script: it padded every chat to model_max_length, 85% of a pass at 300 tokens of 2048."""
    sequences = draw([40, *range(2, 39)])
    seen = []
    base = PackedBase(model_of("llama"), 200)
    handle = model_of("llama").register_forward_pre_hook(
        lambda *args: seen.append(args[2]["input_ids"].shape), with_kwargs=True
    )
    base.states(sequences, [[0] for _ in sequences])
    handle.remove()
    assert sum(rows * width for rows, width in seen) < 1.1 * sum(map(len, sequences))


def test_beginnings_of_another_sequence_are_not_run_again() -> None:
    """The turns of a chat: the last turn's sequence contains the others."""
    whole = draw([30])[0]
    sequences = [whole[:12], whole, [*whole[:12], 98], whole[:21], whole]
    assert hosts(sequences) == [1, 1, 2, 1, 1] or hosts(sequences) == [4, 4, 2, 4, 4]
    base, seen = PackedBase(model_of("llama")), []
    handle = model_of("llama").register_forward_pre_hook(
        lambda *args: seen.append(args[2]["input_ids"].numel()), with_kwargs=True
    )
    states = base.states(sequences, [[3, 11], [3, 29], [12], [20], [0]])
    handle.remove()
    assert sum(seen) == 60  # two rows of 30, one of them with 13 tokens in it
    for sequence, own, found_NC in zip(sequences, [[3, 11], [3, 29], [12], [20], [0]], states, strict=True):
        torch.testing.assert_close(found_NC, alone(model_of("llama"), sequence)[0][own], atol=1e-5, rtol=0)


@given(st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=8))
def test_a_host_is_the_longest_sequence_that_begins_alike(sequences: list[list[int]]) -> None:
    for sequence, host in zip(sequences, hosts(sequences), strict=True):
        assert sequences[host][: len(sequence)] == sequence
        begun = [other for other in sequences if other[: len(sequences[host])] == sequences[host]]
        assert all(other == sequences[host] for other in begun)  # a host is no beginning of another


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200), st.integers(0, 300), st.booleans())
def test_passes_hold_every_sequence_once_and_few_enough_tokens(
    lengths: list[int], pass_tokens: int, row_tokens: int, shares_rows: bool
) -> None:
    passes = list(packs(lengths, pass_tokens, row_tokens, shares_rows))
    assert sorted(i for rows in passes for row in rows for i in row) == list(range(len(lengths)))
    for rows in passes:
        width = max(sum(lengths[i] for i in row) for row in rows)
        longest = max(lengths[i] for row in rows for i in row)
        assert longest <= width <= (max(longest, row_tokens) if shares_rows else longest)
        assert len(rows) == 1 or len(rows) * width <= pass_tokens
        assert shares_rows or all(len(row) == 1 for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_states_are_those_of_the_models_own_forward(family: str) -> None:
    """The output layer alone would leave out soft caps (gemma) and scaling (granite)."""
    hidden_TC, logits_TV = alone(model_of(family), draw([17])[0])
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model_of(family), hidden_TC), logits_TV, atol=1e-6, rtol=0)
    ids_NK, logprobs_NK = teacher(model_of(family), hidden_TC, 5)
    best = logits_TV.log_softmax(-1).topk(5)
    assert torch.equal(ids_NK, best.indices.int())
    torch.testing.assert_close(logprobs_NK, best.values, atol=1e-5, rtol=0)


def test_an_engines_model_teaches_as_it_did_before(tiny_base: Any) -> None:
    """Its attention is the engine's, which needs a cache; afterwards the engine goes on as if nothing had been."""
    engine = Engine.load(str(tiny_base))
    (before,) = engine.generate([[1, 4, 30]], max_new_tokens=8, capture_hidden=True, ignore_eos=True)
    ids_NK, _ = teacher(engine.model, before.hidden_TC, 3)
    assert ids_NK[:, 0].tolist() == before.token_ids
    (after,) = engine.generate([[1, 4, 30]], max_new_tokens=8, ignore_eos=True)
    assert after.token_ids == before.token_ids


def test_more_teachers_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="the base has 99 tokens"):
        teacher(model_of("llama"), torch.zeros(1, 32), 100)
