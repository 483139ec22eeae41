"""Chats -> labels, through chat templates of the shapes that are out there, and on to the base's states.

Each template here is a small one of our own in the style of a family. A label too many, a second BOS or a masked end of
turn still trains; only acceptance drops. D1 and so on number the defects of the original training script.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from medusa_ray import data, distill, parts, provenance, records
from medusa_ray.chat import Chat
from medusa_ray.config import DataConfig, HiddenConfig, ModelConfig, RunConfig, UserError
from medusa_ray.states import Body

# ------------------------------------------------------------------------------------------- templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The end of a turn stands outside the marks, as in many a template; the header betrays whether there is an answer.
MARKED = (
    "{{ messages | length }} messages\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}{%- endgeneration -%}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A default system prompt, and thoughts that are dropped once the next question is asked.
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS is the template's own, there is always a system turn with a date, and contents are trimmed.
LLAMA = (
    "{{ bos_token }}<|header|>system<|end_header|>\n\nToday: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot|>{% for m in messages %}<|header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}"
)
# No generation prompt: an answer begins right after the instruction.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """A template, its end-of-turn token, how many BOS a prompt has and what stands before an answer's text."""

    template: str
    end: str
    num_bos: int = 0
    before: str = ""


STYLES = {
    "chatml": Style(CHATML, "<|im_end|>"),
    "chatml, marked": Style(MARKED, "<|im_end|>"),
    "qwen": Style(QWEN, "<|im_end|>"),
    "llama": Style(LLAMA, "<|eot|>", num_bos=1),
    "mistral": Style(MISTRAL, "<|end|>", num_bos=1, before=" "),
    "gemma": Style(GEMMA, "<end_of_turn>", num_bos=1),
}
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
BOS = 1

# What the assistant says has been said before, in the question and in its own words.
TALK = [
    {"role": "user", "content": "say: four or user"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "four? say four again"},
    {"role": "assistant", "content": "four again"},
]
ANSWERS = ["four", "four again"]


def chat_in(style: Style, tiny_base: Path) -> Chat:
    """A tokenizer that puts BOS before bare text by itself, as Llama's does."""
    tokenizer: PreTrainedTokenizerBase = Chat.load(str(tiny_base)).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", BOS)]
    )
    tokenizer.chat_template = style.template
    return Chat(tokenizer, [tokenizer.convert_tokens_to_ids(style.end)])


def rows_of(chat: Chat, talk: list[dict[str, str]], loss_on: str = "assistant") -> list[dict[str, Any]]:
    config = DataConfig(train="-", loss_on=loss_on)
    return data.prompt_rows(chat, "c", json.dumps(talk), None, config)


def labels_of(chat: Chat, row: dict[str, Any]) -> str:
    """The text that a row's label mask lets through, special tokens shown."""
    made = records.hidden_row("c", row["prompt_ids"], row["reference_ids"], b"", "assistant")
    ids = [token for token, may_be in zip(made["input_ids"], made["label_mask"], strict=True) if may_be]
    return str(chat.tokenizer.decode(ids))


@pytest.mark.parametrize("name", STYLES)
def test_labels_are_the_assistants_tokens_alone(name: str, tiny_base: Path) -> None:
    """D1: the script's mask let every token through, the system's, the user's and the template's."""
    style = STYLES[name]
    chat = chat_in(style, tiny_base)
    rows = rows_of(chat, TALK)
    assert [labels_of(chat, row) for row in rows] == [style.before + answer + style.end for answer in ANSWERS]


@pytest.mark.parametrize("name", STYLES)
def test_a_prompt_is_what_serving_sends_with_one_bos_at_most(name: str, tiny_base: Path) -> None:
    """D4: the script rendered a BOS and then tokenised with another."""
    chat = chat_in(STYLES[name], tiny_base)
    for turn, row in enumerate(rows_of(chat, TALK)):
        text = chat.tokenizer.apply_chat_template(
            TALK[: 2 * turn + 1], add_generation_prompt=True, tokenize=False
        )
        assert chat.tokenizer.decode(row["prompt_ids"]) == text
        assert (row["prompt_ids"] + row["reference_ids"]).count(BOS) == STYLES[name].num_bos
        as_the_script = chat.tokenizer(text)["input_ids"]
        assert as_the_script.count(BOS) == STYLES[name].num_bos + 1


def test_what_was_said_before_or_is_trimmed_is_found_where_it_stands(tiny_base: Path) -> None:
    """D5: the script took the first place where the text occurs, and stopped where the template had altered it."""
    chat = chat_in(STYLES["llama"], tiny_base)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  x "}]
    (row,) = rows_of(chat, talk)
    text = chat.tokenizer.apply_chat_template(talk, tokenize=False)
    assert "  x " not in text  # a search for the answer finds nothing
    assert text.index("x") < len(chat.tokenizer.decode(row["prompt_ids"]))  # or finds the question
    assert labels_of(chat, row) == "x<|eot|>"


def test_thoughts_are_labels_of_their_turn_and_no_history_of_the_next(tiny_base: Path) -> None:
    chat = chat_in(STYLES["qwen"], tiny_base)
    thinking = [TALK[0], {"role": "assistant", "content": "<think>2 + 2</think>four"}, *TALK[2:]]
    first, second = rows_of(chat, thinking)
    assert labels_of(chat, first) == "<think>2 + 2</think>four<|im_end|>"
    assert "think" not in chat.tokenizer.decode(second["prompt_ids"])


def test_a_template_without_a_system_role_refuses_that_row_alone(tiny_base: Path) -> None:
    chat = chat_in(STYLES["gemma"], tiny_base)
    (row,) = rows_of(chat, [{"role": "system", "content": "be"}, *TALK[:2]])
    assert row["error"].startswith("template refuses: ")
    assert "no system role" in row["error"]


@pytest.mark.ray
def test_where_only_the_template_hides_replies_the_run_stops_and_names_it(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    """All labels would be masked: the script trained on nothing and saved its heads."""
    base = tmp_path / "base"
    chat = Chat.load(str(tiny_base))
    chat.tokenizer.chat_template = "{{ messages | length }} messages so far" + CHATML
    chat.tokenizer.save_pretrained(base)
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    rows = rows_of(Chat.load(str(base)), TALK)
    assert [(row["error"], row["reference_ids"]) for row in rows] == [(None, None)] * 2
    parts.write(f"{tmp_path}/prompts/train", "part-000000", pa.Table.from_pylist(rows, records.PROMPTS))
    provenance.write(f"{tmp_path}/prompts", {}, {}, splits={"train": {"longest_prompt_tokens": 99}})
    raw = {"output": str(tmp_path), "model": {"base": str(base)}, "data": {"train": "-"}}
    config = RunConfig.model_validate({**raw, "distill": {"replies": "given"}, "hidden": {"mode": "compute"}})
    with pytest.raises(
        UserError, match=r"none of 2 training rows .*'\{\{ messages \| length \}\} messages so far"
    ):
        distill.run(config)
    assert provenance.read(config.artifact("distilled")) is None


# ------------------------------------------------------------------------------------------- states


def states_of(base: Path, prompt_ids: list[int], reply_ids: list[int], **options: Any) -> torch.Tensor:
    """Of the reply's labels, by the hidden stage's own worker."""
    body = Body(
        ModelConfig(base=str(base), dtype="float32"), str(base), "cpu", HiddenConfig(**options), "last"
    )
    row = {
        "id": "0",
        "prompt_ids": prompt_ids,
        "reply_ids": reply_ids,
        "finish_reason": "stop",
        "error": None,
    }
    (made,) = body.hidden_table(pa.Table.from_pylist([row], records.DISTILLED)).to_pylist()
    return torch.frombuffer(bytearray(made["hidden"]), dtype=torch.float32).view(len(reply_ids) - 1, -1)


@torch.no_grad()
def plain_states(model: LlamaForCausalLM, ids: list[int], first: int, **mask: Any) -> torch.Tensor:
    return model.model(torch.tensor([ids]), **mask).last_hidden_state[0, first:-2]


def test_ends_of_turns_are_attended_to_like_any_token(tiny_base: Path) -> None:
    """D3: the script padded with the end-of-turn token and masked that token everywhere."""
    chat = Chat.load(str(tiny_base))
    _, row = rows_of(chat, TALK)
    prompt_ids, reply_ids = row["prompt_ids"], row["reference_ids"]
    ids, end, first = prompt_ids + reply_ids, 2, len(prompt_ids) - 1
    assert prompt_ids.count(end) > 2
    assert reply_ids[-1] == end
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    found_NC = states_of(tiny_base, prompt_ids, reply_ids)
    torch.testing.assert_close(found_NC, plain_states(model, ids, first), atol=1e-5, rtol=0)
    masked_NC = plain_states(model, ids, first, attention_mask=torch.tensor([ids]).ne(end))
    assert (masked_NC - found_NC).abs().max() > 0.1


def test_positions_are_as_the_base_was_trained_whatever_the_limit_on_prompts(tmp_path: Path) -> None:
    """D13: the script forced linear scaling of RoPE where its limit was longer than the base's positions."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = LlamaConfig(**shape, **heads, rope_parameters=scaling, max_position_embeddings=128)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 99, (60,)).tolist()
    assert DataConfig(train="-").max_prompt_tokens > config.max_position_embeddings
    found_NC = states_of(tmp_path, ids[:50], ids[50:])
    torch.testing.assert_close(found_NC, plain_states(model, ids, 49), atol=1e-5, rtol=0)
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 16.0}
    forced = LlamaForCausalLM(config).eval()
    forced.load_state_dict(model.state_dict())
    assert (plain_states(forced, ids, 49) - found_NC).abs().max() > 0.1
