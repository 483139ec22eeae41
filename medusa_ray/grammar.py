"""What the text of a reply must be, a JSON schema or a regular expression -> the tokens that may come next.

llguidance compiles a grammar to a matcher that lives beside one reply. It stands where it was last asked, goes back to
where the next question parts from that and on from there, so that a node of a tree costs its own token and no more.
"""

import asyncio
import json
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_CHARACTERS = 65536  # of a schema as JSON
MAX_REGEX_CHARACTERS = 4096
MAX_DEPTH = 48  # of lists and objects in a schema
MAX_CHOICES = 1000
# llguidance builds an automaton with a state per remainder: 24 s for a six-digit number, milliseconds for this one.
MAX_MULTIPLE = 10_000
COMPILE_TIMEOUT_S = 5.0
NUM_COMPILING = 2
NUM_KEPT = 64
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # 1 to 2 kB a state
# White space as models write it on one line. More of it would let a reply be nothing else until its tokens run out.
JSON_OPTIONS: Any = {"whitespace_pattern": "[ ]?"}


class GrammarError(ValueError):
    """A grammar that cannot be compiled, and why."""


@dataclass(frozen=True)
class Grammar:
    """What text a reply may be, in the form that llguidance takes."""

    text: str


def of_json_schema(schema: Any) -> Grammar:
    """JSON that a schema (draft 2020-12, as far as llguidance has it) lets pass. Raises GrammarError."""
    return Grammar(LLMatcher.grammar_from_json_schema(_checked(schema), overrides=JSON_OPTIONS))


def of_regex(pattern: str) -> Grammar:
    """Text that a regular expression matches whole: Rust's syntax, so no look-around. Raises GrammarError."""
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise GrammarError(
            f"the expression has {len(pattern)} characters; expected at most {MAX_REGEX_CHARACTERS}"
        )
    return Grammar(LLMatcher.grammar_from_regex(pattern))


def of_choices(choices: Sequence[str]) -> Grammar:
    """One of these texts. Raises GrammarError."""
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise GrammarError(f"{len(choices)} choices came; expected 1 to {MAX_CHOICES}, none of them empty")
    _check_size(sum(map(len, choices)))
    return Grammar(LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, choices))))


def of_calls(functions: Sequence[tuple[str, Any]], are_several: bool = False) -> Grammar:
    """A call `{"name": ..., "arguments": ...}` of one of the functions, or a list of such calls.

    functions: the name of each and the schema of its arguments. Raises GrammarError.
    """
    rules = [
        f"start: {_quoted('[')} call ({_quoted(', ')} call)* {_quoted(']')}" if are_several else "start: call"
    ]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, (name, schema) in enumerate(functions):
        head = f'{{"name": {json.dumps(name)}, "arguments": '
        options = {**_checked(schema), "x-guidance": JSON_OPTIONS}
        rules += [
            f"call_{i}: {_quoted(head)} args_{i} {_quoted('}')}",
            f"args_{i}: %json {json.dumps(options)}",
        ]
    return Grammar(LLMatcher.grammar_from_lark("\n".join(rules)))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _checked(schema: Any) -> dict[str, Any]:
    """The schema, if it can be compiled in no time and no memory to speak of."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(f"the schema is of type {type(schema).__name__}; expected an object")
    product = Fraction(1)
    for depth, key, value in _walk(schema):
        if depth > MAX_DEPTH:
            raise GrammarError(f"the schema is nested deeper than {MAX_DEPTH} levels")
        if key == "x-guidance":  # would set the options that are ours
            raise GrammarError("the schema has the key x-guidance, which is not supported; leave it out")
        if key == "multipleOf" and isinstance(value, int | float) and not isinstance(value, bool) and value:
            product *= abs(Fraction(str(value)))
            if max(product.numerator, product.denominator) > MAX_MULTIPLE:
                raise GrammarError(
                    f"multipleOf is {value}; expected at most {MAX_MULTIPLE}, all of them multiplied"
                )
    _check_size(len(json.dumps(schema)))
    return schema


def _walk(schema: dict[str, Any]) -> Iterator[tuple[int, Any, Any]]:
    """Depth, key and value of all that is in it. A loop, since Python's own recursion ends before a client's does."""
    waiting: list[tuple[int, Any, Any]] = [(0, None, schema)]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, dict):
            waiting += [(depth + 1, name, inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(depth + 1, None, inner) for inner in value]


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise GrammarError(f"it has {size} characters; expected at most {MAX_CHARACTERS}")


@dataclass(frozen=True)
class Compiled:
    """A grammar for one vocabulary: a matcher at its start, to be copied, and the tokens that may come first."""

    matcher: LLMatcher
    start_V: Tensor


class Grammars:
    """The grammars of one base's vocabulary. Each is compiled once while it is among those used last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: Collection[int]) -> None:
        """end_ids: tokens that end a reply; allowed where the grammar is complete, and nowhere else."""
        self._tokenizer, self.vocab_size, self._end_ids = tokenizer, vocab_size, sorted(end_ids)
        self._vocabulary: LLTokenizer | None = (
            None  # takes a second for a large one, and few requests need it
        )
        self._kept: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(NUM_COMPILING, thread_name_prefix="grammar")

    async def start(self, grammar: Grammar) -> "Matcher":
        """A matcher for one reply. Raises GrammarError, after COMPILE_TIMEOUT_S at the latest."""
        compiled = self._look_up(grammar)
        if compiled is None:
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, grammar)
            try:
                compiled = await asyncio.wait_for(work, COMPILE_TIMEOUT_S)
            except TimeoutError:
                raise GrammarError(f"it took longer than {COMPILE_TIMEOUT_S:g} s to compile") from None
        return Matcher(compiled)

    def _look_up(self, grammar: Grammar) -> Compiled | None:
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _compile(self, grammar: Grammar) -> Compiled:
        matcher = LLMatcher(self._load_vocabulary(), grammar.text, log_level=0, limits=LIMITS)
        _raise_failure(matcher)
        start_V = _allowed(matcher, self.vocab_size)
        _raise_failure(matcher)
        if matcher.is_stopped() and not matcher.is_accepting():
            raise GrammarError("no text matches it")
        compiled = Compiled(matcher, start_V)
        with self._lock:
            self._kept[grammar] = compiled
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _load_vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                if not self._end_ids:
                    raise GrammarError(
                        "this base has no end-of-sequence token, by which its replies could end"
                    )
                try:
                    text = _without_special_texts(self._tokenizer.backend_tokenizer.to_str())
                    self._vocabulary = LLTokenizer(text, self.vocab_size, self._end_ids)
                except Exception as error:  # whatever llguidance says of a tokenizer that is not of bytes
                    raise GrammarError(
                        f"this base's tokenizer cannot be held to grammars: {error}"
                    ) from error
            return self._vocabulary


class Matcher:
    """What may follow each beginning of one reply: the engine's AllowedTokens. For one reply, and one thread.

    Where llguidance gives up, at its limits on memory and time, nothing may follow; `failure` says why. That ends a
    reply there and no other, with guesses or without.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self.failure: str | None = None
        self._begin()

    def __call__(self, token_ids: list[int]) -> Tensor:
        if not token_ids:
            return self._compiled.start_V
        try:
            return self._after(token_ids)
        except Exception as error:  # it would end the engine
            self.failure = str(error)
            self._begin()  # llguidance never leaves a failure, but other walks may not come to it
            return torch.zeros_like(self._compiled.start_V)

    def _begin(self) -> None:
        self._matcher, self._taken = self._compiled.matcher.deep_copy(), list[int]()

    def _after(self, token_ids: list[int]) -> Tensor:
        num_same = _num_same(self._taken, token_ids)
        if num_same < len(self._taken):
            self._matcher.rollback(len(self._taken) - num_same)
        new = token_ids[num_same:]
        self._taken[num_same:] = new
        if new and not self._matcher.consume_tokens(new):
            _raise_failure(self._matcher)
        allowed_V = _allowed(self._matcher, len(self._compiled.start_V))
        _raise_failure(self._matcher)
        return allowed_V


def _without_special_texts(tokenizer: str) -> str:
    """A tokenizer's JSON with names for its special tokens that no text has.

    Where a grammar leaves one text only, llguidance has it tokenized, and would find the token in `<|end|>`.
    """
    spec = json.loads(tokenizer)
    names = {
        token["content"]: f"<|{uuid.uuid4().hex}|>" for token in spec["added_tokens"] if token["special"]
    }
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        spec["model"]["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
    else:  # unigram: pairs of a text and its score
        spec["model"]["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    return json.dumps({**spec, "post_processor": None, "truncation": None, "padding": None})


def _num_same(one: list[int], other: list[int]) -> int:
    """Length of the beginning that both have. They are walks of one tree, so they part near their ends."""
    num = min(len(one), len(other))
    while one[:num] != other[:num]:
        num -= 1
    return num


def _allowed(matcher: LLMatcher, vocab_size: int) -> Tensor:
    """bool [V]: a bit for each token, of 32 at a time."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return torch.from_numpy(bits[:vocab_size].view(np.bool_))


def _raise_failure(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(re.split(r"\n<state>", matcher.get_error())[0].strip())
