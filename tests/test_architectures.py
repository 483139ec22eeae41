"""Every architecture that the engine serves says what transformers' own `generate` says, token for token, and every
one that it cannot serve is refused with the reason.

The models are random, of two layers, with windows far shorter than the texts. Initial weights are wide, so that
replies vary and no two scores come near a tie: all is float32, and equality is exact.
"""

import logging
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fake_heads import TableHeads
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from medusa_ray.medusa import attention
from medusa_ray.medusa.attention import Step
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.tree import Tree

pytestmark = pytest.mark.long

VOCAB, NEW_TOKENS = 128, 24
PROMPT_LENGTHS = (3, 20, 52)  # the last reply runs over the end of a page

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {  # latent attention, whose keys are larger than its values
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LONGROPE = rope(
    "longrope",
    short_factor=[1.0, 1.5, 2.0, 3.0],
    long_factor=[3.0, 5.0, 8.0, 9.0],
    original_max_position_embeddings=128,
)

# model_type and what differs from SIZES.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 rope": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama, yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama, linear rope": ("llama", rope("linear", factor=4.0)),
    "llama, dynamic rope": ("llama", rope("dynamic", factor=4.0)),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "num_experts": 4, **MOE}),
    "mistral": ("mistral", WINDOW),
    "ministral": ("ministral", {"head_dim": 8, **ALTERNATING}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 8.0,
            **ALTERNATING,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **ALTERNATING}),
    "gemma4": (  # two layers that use the keys and values of the two before, and layers of unlike head sizes
        "gemma4_text",
        {
            **WINDOW,
            "layer_types": ALTERNATING["layer_types"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", WINDOW),
    "phi3, longrope": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 128, **LONGROPE}),
    "phimoe": ("phimoe", {"sliding_window": None, "num_local_experts": 4}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", ALTERNATING),
    "granite": (
        "granite",
        {
            "logits_scaling": 3.0,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **ALTERNATING}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", WINDOW),
    "glm4": ("glm4", {"head_dim": 16}),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "exaone4": ("exaone4", ALTERNATING),
    "seed_oss": ("seed_oss", {"head_dim": 8}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "minicpm3": ("minicpm3", MLA),
    "deepseek_v3": (
        "deepseek_v3",
        {**MLA, **MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "mimo_v2_flash": (  # layers of unlike numbers of key/value heads
        "mimo_v2_flash",
        {**MOE, "head_dim": 12, "v_head_dim": 8, "n_routed_experts": 4, **ALTERNATING},
    ),
}

DEEP_AND_WIDE = (
    "0 1 2 3 00 01 10 11 20 02 000 010 101 110 200"  # its walks lie apart, so keys and values have to move
)
TREES = {
    "chain": Tree.chain(3),
    "tree": Tree.from_paths([int(rank) for rank in path] for path in DEEP_AND_WIDE.split()),
    "published": Tree.published(),
}


def build(model_type: str, seed: int = 1, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, biases and sinks, which begin as ones and zeros
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in PROMPT_LENGTHS]


def plain_reply(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' own generate says."""
    prompt_1T = torch.tensor([prompt], device=model.device)
    everything = torch.ones_like(prompt_1T)  # without it, tokens equal to the padding's would be left out
    text_1T = model.generate(prompt_1T, attention_mask=everything, max_new_tokens=num_tokens, do_sample=False)
    return text_1T[0, len(prompt) :].tolist()


@dataclass
class Served:
    """A model that the engine has taken over, and what it said before that."""

    backbone: Backbone
    replies: list[list[int]]
    state_MC: Tensor  # at every token that guesses follow
    coming: list[list[int]]  # what the base says after the next token, for each state


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    model_type, settings = ARCHITECTURES[request.param]
    model = build(model_type, **settings)
    replies, states, coming = [], [], []
    with torch.inference_mode():
        for prompt in prompts():
            reply = plain_reply(model, prompt, NEW_TOKENS)
            seen = []
            hook = model.get_output_embeddings().register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            model(torch.tensor([prompt + reply]))
            hook.remove()
            states.append(seen[0][0, len(prompt) - 1 : -1])
            coming += [reply[done + 1 :] for done in range(NEW_TOKENS)]
            assert len(set(reply)) > NEW_TOKENS / 4, (
                "a reply that repeats itself says little; widen initializer_range"
            )
            replies.append(reply)
    return Served(Backbone(model), replies, torch.cat(states), coming)


def guesses(kind: str, coming: list[list[int]], tree: Tree) -> Tensor:
    """[M, H, K] of every state: what heads of this kind guess."""
    draw = random.Random(4)
    deepest = [path for path in tree.paths if len(path) == tree.depth]
    rows = []
    for tokens in coming:
        path = draw.choice(deepest)
        row = []
        for head in range(tree.depth):
            right = tokens[head] if head < len(tokens) else -1
            ranks = draw.sample([token for token in range(VOCAB) if token != right], tree.num_ranks)
            is_right = {
                "oracle": True,
                "random": draw.random() < 0.5,
                "adversarial": head > 0,  # right, but nobody gets there
            }[kind]
            if is_right and right >= 0:
                ranks[path[head] if kind == "oracle" else draw.randrange(tree.num_ranks)] = right
            row.append(ranks)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["oracle", "random", "adversarial"])
@pytest.mark.parametrize("tree", TREES)
def test_greedy_replies_equal_those_of_generate_whatever_the_heads_guess(
    served: Served, tree: str, kind: str
):
    shape = TREES[tree]
    heads = TableHeads(served.state_MC, guesses(kind, served.coming, shape), VOCAB)
    engine = Engine(served.backbone, heads, shape, max_batch_size=3, max_total_tokens=128)
    done = engine.generate(prompts(), max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert [d.token_ids for d in done] == served.replies
    steps = [d.num_steps for d in done]
    # The first token comes with the prompt, the others with the steps.
    if kind == "oracle":
        assert steps == [math.ceil((NEW_TOKENS - 1) / (shape.depth + 1))] * 3
    elif kind == "adversarial":
        assert steps == [NEW_TOKENS - 1] * 3
    else:
        assert max(steps) < NEW_TOKENS - 1


@pytest.mark.parametrize(
    "name", [name for name, (_, settings) in ARCHITECTURES.items() if settings.get("sliding_window")]
)
def test_the_windows_above_are_short_enough_to_change_what_is_said(name: str):
    model_type, settings = ARCHITECTURES[name]
    prompt = prompts()[1]
    short, long = build(model_type, **settings), build(model_type, **{**settings, "sliding_window": 200})
    assert plain_reply(short, prompt, NEW_TOKENS) != plain_reply(long, prompt, NEW_TOKENS)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_guesses_behind_the_last_position_do_no_harm(model_type: str):
    """Learned positions end with their table: a tree near the limit of the model reaches over it."""
    settings = {**ARCHITECTURES[model_type][1], "max_position_embeddings": 48}
    model = build(model_type, **settings)
    prompt = prompts()[1]
    num_tokens = 48 - len(prompt)
    reply = plain_reply(model, prompt, num_tokens)
    tree = Tree.published()
    heads = MedusaHeads(tree.depth, hidden_size=32, vocab_size=VOCAB).eval()
    engine = Engine(Backbone(model), heads, tree)
    assert engine.generate([prompt], max_new_tokens=num_tokens)[0].token_ids == reply


@pytest.mark.parametrize("name", ["llama, dynamic rope", "phi3, longrope"])
def test_rope_that_follows_the_longest_sequence_is_served_as_far_as_it_stands_still(name: str):
    """Beyond that, transformers itself gives a prompt another reply beside a longer one."""
    model_type, settings = ARCHITECTURES[name]
    settings = {**settings, "max_position_embeddings": 48}
    if model_type == "phi3":
        settings = {
            **settings,
            **LONGROPE,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 48,
        }
        settings["rope_parameters"] = {**settings["rope_parameters"], "original_max_position_embeddings": 48}
    model = build(model_type, **settings)
    prompt = prompts()[1]
    reply = plain_reply(model, prompt, 48 - len(prompt))
    backbone = Backbone(model)
    with pytest.raises(
        ValueError, match=r"max_total_tokens is 128.*longest sequence of the batch.*at most 48"
    ):
        Engine(backbone, max_total_tokens=128)
    tree = Tree.published()
    heads = MedusaHeads(tree.depth, hidden_size=32, vocab_size=VOCAB).eval()
    engine = Engine(backbone, heads, tree, max_total_tokens=48)
    assert engine.generate([prompt], max_new_tokens=48 - len(prompt))[0].token_ids == reply


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("stablelm", {}, "does not call transformers' attention interface"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv.* keep a state"),
        ("mamba", {}, "layers of type linear_attention.* keep a state"),
        (
            "qwen3_next",
            {
                "layer_types": ["linear_attention", "full_attention"],
                "head_dim": 8,
                "num_experts": 4,
                "shared_expert_intermediate_size": 16,
                **MOE,
            },
            "layers of type linear_attention.* keep a state",
        ),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2}, "layers of type chunked_attention.*mask"),
        (
            "nemotron",
            {},
            "does not pass keyword arguments on to its attention function, so that NemotronAttention",
        ),
        ("diffllama", {}, "DiffLlamaAttention attends twice in layer 0"),
        (
            "bert",
            {},
            r"logits .* differ from plain transformers' by 1 of their size, where 0.0001 is allowed",
        ),
        (
            "phimoe",
            {"sliding_window": 64, "num_local_experts": 4},
            r"differ .* \(with its sliding window of 64 cut to 5\).* a mask, a window",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason_and_left_as_it_was(
    model_type: str, settings: dict[str, Any], reason: str
):
    model = build(model_type, **settings)
    text_1T = torch.tensor([prompts()[1]])
    before, its_own = model(text_1T).logits, model.config._attn_implementation
    with pytest.raises(
        ValueError, match=rf"{type(model).__name__} cannot be served: .*{reason}.*Serve it with"
    ):
        Engine.load(model)
    assert model.config._attn_implementation == its_own
    assert model(text_1T).logits.equal(before)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_an_encoder_decoder_and_a_model_without_an_output_layer_are_refused():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="it is an encoder-decoder"):
        Engine.load(t5)
    with pytest.raises(ValueError, match=r"no output layer.*Load it with AutoModelForCausalLM"):
        Engine.load(build("llama").model)


def test_a_model_whose_layers_take_no_further_arguments_is_refused(monkeypatch):
    right = LlamaAttention.forward

    # past_key_values and cache are one argument, renamed in transformers 5.24.
    def narrow(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, cache=None,
               use_cache=False, position_ids=None):  # fmt: skip
        return right(self, hidden_states, position_embeddings, attention_mask)

    monkeypatch.setattr(LlamaAttention, "forward", narrow)
    with pytest.raises(ValueError, match=r"fails on the engine's way \(TypeError: .*'step'\)"):
        Backbone(build("llama"))


# ---------------------------------------------------------------- the measurement itself, with mistakes put in


def test_the_measurement_leaves_nothing_behind():
    model = build("gemma3_text", **ARCHITECTURES["gemma3"][1])
    its_own = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    Backbone(model)
    assert all(
        tensor.equal(its_own[name]) for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    )
    assert model.config.to_dict() == config
    assert torch.get_rng_state().equal(random_state)
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows


def see_everything(step: Step, window: int | None, num_groups: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(RIGHT_MASK(step, window, num_groups, dtype))


def see_siblings(step: Step, window: int | None, num_groups: int, dtype: torch.dtype) -> Tensor:
    """A node sees whatever stands before it, as in plain text."""
    own_slot_BT = (step.read_BS[:, None] == step.write_BT[..., None]).int().argmax(-1)
    behind_BTS = torch.arange(step.read_BS.shape[1]) > own_slot_BT[..., None]
    mask_BTS = torch.zeros_like(behind_BTS, dtype=dtype).masked_fill(behind_BTS, -torch.inf)
    return mask_BTS.repeat(1, num_groups, 1)[:, None]


RIGHT_MASK, RIGHT_STEP = Step.mask, attention.tree_step


def see_one_further(step: Step, window: int | None, num_groups: int, dtype: torch.dtype) -> Tensor:
    """A window that is one token too long."""
    return RIGHT_MASK(step, window and window + 1, num_groups, dtype)


def forget_the_window(step: Step, window: int | None, num_groups: int, dtype: torch.dtype) -> Tensor:
    return RIGHT_MASK(step, None, num_groups, dtype)


def stand_in_slots(*args: Any) -> Step:
    """Nodes at the position of their slot, not of their depth."""
    step = RIGHT_STEP(*args)
    first_B1 = step.position_BT[:, :1]
    return replace(step, position_BT=first_B1 + torch.arange(step.position_BT.shape[1]))


def stand_where_the_first_row_stands(*args: Any) -> Step:
    step = RIGHT_STEP(*args)
    return replace(step, position_BT=step.position_BT[:1].expand_as(step.position_BT))


def measure_windows_in_slots(step: Step, *kind: Any) -> Tensor:
    """Windows that take a slot's number for its position."""
    slot_S = torch.arange(step.read_BS.shape[1])
    step = replace(
        step,
        position_BT=step.position_BT[:, :1] + torch.arange(step.position_BT.shape[1]),
        position_BS=slot_S.expand_as(step.read_BS),
        masks={},
    )
    return RIGHT_MASK(step, *kind)


def write_over_the_last(*args: Any) -> Step:
    """The first node lands on the last token of the context."""
    step = RIGHT_STEP(*args)
    return replace(
        step, write_BT=torch.cat([(step.write_BT[:, :1] - 1).clamp_min(64), step.write_BT[:, 1:]], 1)
    )


MISTAKES = [
    ("llama", Step, "mask", see_everything),
    ("llama", attention, "tree_step", stand_in_slots),
    ("mistral", Step, "mask", forget_the_window),
]
# What rounding at 16 bits can hide.
MILD_MISTAKES = [
    ("llama", Step, "mask", see_siblings),
    ("llama", attention, "tree_step", stand_where_the_first_row_stands),
    ("llama", attention, "tree_step", write_over_the_last),
    ("gpt2", attention, "tree_step", stand_in_slots),
    ("mistral", Step, "mask", see_one_further),
    ("gemma3", Step, "mask", forget_the_window),
    ("gemma3", Step, "mask", measure_windows_in_slots),
]


@pytest.mark.parametrize(
    ("dtype", "name", "where", "what", "mistake"),
    [(torch.float32, *mistake) for mistake in MISTAKES + MILD_MISTAKES]
    + [(dtype, *mistake) for dtype in (torch.bfloat16, torch.float16) for mistake in MISTAKES],
)
def test_a_mistake_in_masks_or_positions_shows(
    monkeypatch, dtype, name: str, where: Any, what: str, mistake: Any
):
    model_type, settings = ARCHITECTURES[name]
    Backbone(build(model_type, **settings).to(dtype))
    monkeypatch.setattr(where, what, mistake)
    with pytest.raises(ValueError, match=r"cannot be served: the .* differ from plain transformers'"):
        Backbone(build(model_type, **settings).to(dtype))


@pytest.mark.parametrize(
    ("name", "argument"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("granite", "scaling")]
)
def test_an_argument_that_attention_ignores_shows(monkeypatch, name: str, argument: str):
    def ignore(*args: Any, **settings: Any) -> Any:
        return attention.attend(*args, **{**settings, argument: None})

    model_type, settings = ARCHITECTURES[name]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attention.NAME, ignore)
    with pytest.raises(ValueError, match="differ from plain transformers'"):
        Backbone(build(model_type, **settings))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_measurement_passes_on_a_gpu(name: str, dtype: torch.dtype):
    model_type, settings = ARCHITECTURES[name]
    Backbone(build(model_type, **settings).to("cuda", dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_at_16_bits_is_no_reason_to_refuse(name: str, dtype: torch.dtype):
    model_type, settings = ARCHITECTURES[name]
    Backbone(build(model_type, **settings).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_layers_that_blow_up_their_own_rounding_are_no_reason_to_refuse(dtype: torch.dtype):
    """A difference of 0.4 and 0.07 here, and as much between two plain forwards."""
    Backbone(build("llama", num_hidden_layers=32).to(dtype))


def test_a_rounding_that_flips_the_choice_of_an_expert_is_no_reason_to_refuse():
    """It changes one position by half its size, where a wrong mask changes most."""
    model_type, settings = ARCHITECTURES["phimoe"]
    for seed in (2, 11, 14):
        Backbone(build(model_type, seed, **{**settings, "initializer_range": 0.3}).half())


def test_a_kernel_that_fails_on_this_machine_is_done_without(monkeypatch, caplog):
    """The base is at no fault then, and must not be refused."""
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    monkeypatch.setattr(attention, "IS_INTERPRETED", True)
    monkeypatch.setattr(attention, "is_kernel_trusted", True)
    monkeypatch.setitem(sys.modules, "medusa_ray.medusa.kernels", None)
    monkeypatch.setattr(logging.getLogger("medusa_ray"), "propagate", True)
    model = build("llama")
    prompt = prompts()[1]
    reply = plain_reply(model, prompt, NEW_TOKENS)
    assert attention.takes_kernel(torch.device("cpu"), 5)
    engine = Engine(Backbone(model))
    assert "without the GPU's own kernel, which fails here" in caplog.text
    assert not attention.takes_kernel(torch.device("cpu"), 5)
    assert engine.generate([prompt], NEW_TOKENS)[0].token_ids == reply
