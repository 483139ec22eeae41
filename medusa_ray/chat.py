"""Messages -> token ids, and token ids -> text. Every stage renders chats through here and nowhere else.

Training and serving drift apart silently when two places render: a second BOS or a lost end-of-turn token
still trains, and only acceptance drops.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from medusa_ray.medusa.base import fetched, text_config, under_adapter
from medusa_ray.tools import written_out

Message = dict[str, Any]  # role and content; tool_calls too, where the assistant calls functions
# Code points that Unicode has set aside for programs and that no text should have: one marks what users wrote.
NONCHARACTERS = [chr(point) for point in range(0xFDD0, 0xFDF0)]


class Chat:
    """The chat template and tokenizer of one base model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id  # may be 0, which is a token like any other
        self.eos_ids = frozenset(eos_ids) | frozenset([] if own is None else [own])

    @classmethod
    def load(cls, base: str, revision: str | None = None) -> "Chat":
        """From a folder, URI or hub name; an adapter's own tokenizer, or that of the base that it names.

        Raises OSError when there is no tokenizer, ValueError when it cannot be loaded.
        """
        base = fetched(base)
        name, base_revision = under_adapter(base, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
        except (OSError, ValueError):
            if name == base:
                raise
            tokenizer = AutoTokenizer.from_pretrained(name, revision=base_revision)
        try:
            eos = GenerationConfig.from_pretrained(name, revision=base_revision or "main").eos_token_id
        except OSError:
            eos = None
        return cls(tokenizer, [eos] if isinstance(eos, int) else eos or [])

    def check_vocabulary(self, base: str, revision: str | None = None) -> None:
        """Raises ValueError when the tokenizer has tokens that the base has no embedding for."""
        num_tokens = max(self.tokenizer.get_vocab().values()) + 1
        vocab_size = text_config(base, revision).vocab_size
        if num_tokens > vocab_size:
            raise ValueError(
                f"the tokenizer of {base} has {num_tokens} tokens, but the model has embeddings for {vocab_size}. They "
                "do not belong together: set model.base to a model with the tokenizer that it was trained with."
            )

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of the messages with the generation prompt, ready for the model to answer.

        tools: functions that it may call, as OpenAI describes them. The template itself writes BOS, so none is added;
        what looks like a special token in a message is text. Raises ValueError when the base has no template or the
        template refuses the messages.
        """
        return self._render(messages, add_generation_prompt, tools)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text that `prompt_ids` are of, for whoever sends prompts as text. Raises ValueError as it does."""
        return str(self._apply(messages, add_generation_prompt=True, tokenize=False))

    def reply_ids(
        self, messages: Sequence[Message], reply: str, prompt_ids: Sequence[int] | None = None
    ) -> list[int]:
        """Ids of `reply` as the answer to the messages, its end-of-turn token included.

        prompt_ids: what the messages render to, where the caller knows it; half the work is saved.

        Whatever the template puts after that token (a newline, say) is left off: no model generates it.
        Raises ValueError when the template renders the history differently once it is answered and does not mark what
        the assistant says.
        """
        prompt = self.prompt_ids(messages) if prompt_ids is None else list(prompt_ids)
        answered = [*messages, {"role": "assistant", "content": reply}]
        whole = self._render(answered, add_generation_prompt=False)
        start = len(prompt) if whole[: len(prompt)] == prompt else self._last_marked(answered)
        if start is None:
            raise ValueError(
                f"the chat template {self.template_start!r} renders these messages differently with and without an "
                "answer and has no {% generation %} marks, so the answer's tokens cannot be told apart. Use "
                "distill.replies: generate, which keeps token ids as generated."
            )
        ids = whole[start:]
        ends = [i for i, token in enumerate(ids) if token in self.eos_ids]
        return ids[: ends[-1] + 1] if ends else ids

    def _last_marked(self, messages: Sequence[Message]) -> int | None:
        """Where the tokens of the last turn begin by the template's own marks; None when it has none."""
        if not re.search(r"{%-?\s*generation\s*-?%}", str(self.tokenizer.chat_template)):
            return None
        messages, mark = self._marked(messages)
        rendered: Any = self.tokenizer.apply_chat_template(
            list(messages),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        mask = rendered["assistant_masks"]
        start = max((i for i, is_marked in enumerate(mask) if is_marked), default=None)
        while start and mask[start - 1]:
            start -= 1
        if start is None or mark is None:
            return start
        text = str(self._apply(messages, tokenize=False))
        return len(self._ids_of_marked(text[: rendered["offset_mapping"][start][0]], mark))

    @property
    def template_start(self) -> str:
        """The template's first 60 characters, which tell it from others."""
        return str(self.tokenizer.chat_template)[:60]

    def text_ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of bare text, with the special tokens that the tokenizer adds by itself."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def token_spans(self, text: str, add_special_tokens: bool = True) -> list[dict[str, Any]]:
        """Id and text of each token of bare text, and where it starts and stops there."""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [
            {"id": token, "text": text[start:stop], "start": start, "stop": stop}
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def completion_ids(self, text: str, completion: str, text_ids: Sequence[int]) -> list[int]:
        """Ids of what follows the bare text, end of sequence included, where a tokenizer has one."""
        whole = self.text_ids(text + completion)
        if whole[: len(text_ids)] != list(text_ids):  # a token across the border, or a special one at the end
            whole = [*text_ids, *self.tokenizer(completion, add_special_tokens=False)["input_ids"]]
        ids, end = whole[len(text_ids) :], self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] in self.eos_ids) else [*ids, end]

    def continuation_ids(self, text: str, is_whole: bool) -> list[int]:
        """Ids of generated text, the end-of-sequence token behind it where the text is whole."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, self.tokenizer.eos_token_id] if is_whole else ids

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of a reply, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that texts of replies leave out."""
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of more than N times as many has more than N tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    def detokenizer(self) -> "Detokenizer":
        return Detokenizer(self.tokenizer)

    @property
    def knows_tools(self) -> bool:
        """Whether the template says something of tools; if not, they are written out as text."""
        return bool(re.search(r"\btools\b", str(self.tokenizer.chat_template)))

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        uses_tools = bool(tools) or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        if uses_tools and not self.knows_tools:
            messages, tools = written_out(messages, tools), ()
        (messages, tools), mark = self._marked((messages, tools))
        options = {
            "add_generation_prompt": add_generation_prompt,
            **({"tools": list(tools)} if tools else {}),
        }
        if mark is None:
            return list(self._apply(messages, return_dict=False, **options))
        return self._ids_of_marked(str(self._apply(messages, tokenize=False, **options)), mark)

    # Tokenizers find special tokens in the text of a rendered chat, whoever wrote them: an end of turn that a user
    # typed would end the turn. A mark inside each that a message has keeps them apart from the template's own.

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        longest_first = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """The tokenizer with other names for its special tokens, and these names."""
        text, names = with_secret_names(self.tokenizer)
        return Tokenizer.from_str(text), names

    def _marked(self, values: Any) -> tuple[Any, str | None]:
        """Strings, lists and objects with a mark behind the first character of each special token, and that mark; the
        same ones and None where there is no special token."""
        texts = list(_texts(values))
        if not any(map(self._special.search, texts)):
            return values, None
        mark = next((mark for mark in NONCHARACTERS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise ValueError(
                "the messages hold special tokens, and every code point that could mark them as text"
            )

        def put_marks(text: str) -> str:
            return self._special.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", text)

        return _map_texts(values, put_marks), mark

    def _ids_of_marked(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered chat: of its special tokens those without a mark are some."""
        backend, names = self._renamed
        renamed = self._special.sub(lambda found: names[found[0]], text).replace(mark, "")
        return list(backend.encode(renamed, add_special_tokens=False).ids)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # templates raise jinja2 errors of their own choosing
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the messages: {error}"
            ) from error


def with_secret_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, str]]:
    """The JSON of a tokenizer that finds special tokens by names that no text has; and these names, by the tokens'."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    names = {text: f"<|{uuid.uuid4().hex}|>" for text in special}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        spec["model"]["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
    else:  # unigram: pairs of a text and its score
        spec["model"]["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if spec["model"].get("unk_token") in names:
        spec["model"]["unk_token"] = names[spec["model"]["unk_token"]]
    return json.dumps({**spec, "post_processor": None, "truncation": None, "padding": None}), names


def _texts(value: Any) -> Iterator[str]:
    """Every string in it that is no key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every string changed that is no key."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, change) for inner in value]
    return value


class Detokenizer:
    """Token ids of one reply, as they come -> text. A character split over tokens waits for its last byte."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._shown = ""
        self._ids: list[int] = []
        self._tokenizer = tokenizer

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, often empty."""
        self._ids += token_ids
        text = "".join(self._stream.step(self._backend, token) or "" for token in token_ids)
        self._shown += text
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; U+FFFD where it is part of a character."""
        return str(self._tokenizer.decode([token_id]))

    def finish(self) -> str:
        """What is still held back when the reply ends inside a character."""
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        return whole[len(self._shown) :] if whole.startswith(self._shown) else ""
