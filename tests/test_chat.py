"""A second BOS or a lost end-of-turn token still trains; only acceptance drops. So ids are pinned."""

import json
import shutil
from pathlib import Path

import pytest

from medusa_ray.chat import Chat

BOS, END, USER, ASSISTANT = 1, 2, 4, 5
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


def test_a_prompt_has_one_bos_and_ends_where_the_reply_begins(chat: Chat) -> None:
    ids = chat.prompt_ids(ASK)
    assert ids[:2] == [BOS, USER]
    assert ids[-2:] == [END, ASSISTANT]
    assert ids.count(BOS) == 1
    assert chat.text(ids[2:-2]) == "hi"


def test_a_reply_is_its_text_and_its_end_of_turn_token(chat: Chat) -> None:
    ids = chat.reply_ids(ASK, "SELECT 1")
    assert ids[-1] == END
    assert ids.count(END) == 1
    assert chat.text(ids) == "SELECT 1"


def test_prompt_and_reply_together_are_the_rendered_chat(chat: Chat) -> None:
    whole = chat.tokenizer.apply_chat_template(
        [*ASK, {"role": "assistant", "content": "yo"}], return_dict=False
    )
    assert chat.prompt_ids(ASK) + chat.reply_ids(ASK, "yo") == list(whole)


def test_what_the_template_writes_after_the_end_of_turn_is_no_part_of_a_reply(tiny_base: Path) -> None:
    """Many templates write a newline there, which no model generates."""
    chat = Chat.load(str(tiny_base))
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("<|end|>", "<|end|>\n")
    assert chat.reply_ids(ASK, "yo")[-1] == END


def test_a_template_that_rewrites_history_is_refused_for_given_replies(tiny_base: Path) -> None:
    chat = Chat.load(str(tiny_base))
    unmarked = chat.tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    chat.tokenizer.chat_template = "{{ messages | length }}" + unmarked
    with pytest.raises(ValueError, match="differently with and without an answer"):
        chat.reply_ids(ASK, "yo")


@pytest.mark.parametrize("template", [None, "{{ raise_exception('system first') }}"])
def test_a_template_that_is_missing_or_refuses_is_a_value_error(
    tiny_base: Path, template: str | None
) -> None:
    chat = Chat.load(str(tiny_base))
    chat.tokenizer.chat_template = template
    with pytest.raises(ValueError, match="refuses the messages"):
        chat.prompt_ids(ASK)


def test_end_tokens_are_the_models_and_the_tokenizers(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert Chat.load(str(base)).eos_ids == {0, 2, 5}


def test_token_zero_can_end_a_turn(chat: Chat) -> None:
    """Several families have it so; a truth test on the id loses it."""
    tokenizer = Chat.load(chat.tokenizer.name_or_path).tokenizer
    tokenizer.eos_token = "<|pad|>"
    assert Chat(tokenizer).eos_ids == {0}


def test_a_stream_of_tokens_reads_like_the_whole_text(chat: Chat) -> None:
    """Byte tokens split characters; a replacement sign must never appear."""
    text = "naïve 👩‍👩‍👧 SELECT '日本' -- done"
    stream = chat.detokenizer()
    pieces = [stream.push([token]) for token in chat.text_ids(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # some token ended inside a character


def test_a_reply_cut_inside_a_character_is_finished_as_the_whole_decodes(chat: Chat) -> None:
    ids = chat.text_ids("é")[:1]
    stream = chat.detokenizer()
    assert stream.push(ids) + stream.finish() == chat.text(ids)


def test_special_tokens_do_not_appear_in_a_stream(chat: Chat) -> None:
    stream = chat.detokenizer()
    assert stream.push([*chat.text_ids("ok"), END]) + stream.finish() == "ok"
