"""Replies held to a grammar: valid, the same with guesses or without, and no grammar, however hostile, ends the engine."""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from fake_heads import OracleHeads

from medusa_ray import demo, grammar
from medusa_ray.chat import Chat
from medusa_ray.grammar import Grammar, GrammarError, Grammars, Matcher
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.scheduler import Request
from medusa_ray.medusa.tree import Tree

BASE = Path(demo.__file__).parent / "base"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 2000},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Each holds any reply short, so that greedy ones end: a small base may say the same word for ever.
SCHEMAS: dict[str, Any] = {
    "object": PERSON,
    "enum": {"enum": ["SELECT", "INSERT", 3, None, True, {"a": [1]}]},
    "const": {"const": "x y"},
    "number": {"enum": [1.5, -2, 1e3]},
    "boolean": {"type": "boolean"},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    "date": {"type": "string", "format": "date"},
    "array": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2, "maxItems": 5},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": [1, 2]}],
        "items": False,
        "minItems": 2,
    },
    "any of": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": 99, "minimum": 10}, PERSON]},
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "string", "maxLength": 3},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            },
            "leaf": {
                "type": "object",
                "properties": {"end": {"type": "boolean"}},
                "required": ["end"],
                "additionalProperties": False,
            },
        },
        "$ref": "#/$defs/node",
    },
    "unicode": {"enum": ["é日本", "👩‍👩‍👧", 'naïve "quoted" \\ back']},
    "nested": {
        "type": "object",
        "properties": {
            "table": {"type": "string", "pattern": "^[a-z]{1,8}$"},
            "columns": {
                "type": "array",
                "items": {"type": "string", "maxLength": 6},
                "minItems": 1,
                "maxItems": 3,
            },
            "where": {
                "type": "object",
                "properties": {
                    "op": {"enum": ["=", "<", ">"]},
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["op", "value"],
                "additionalProperties": False,
            },
        },
        "required": ["table", "columns", "where"],
        "additionalProperties": False,
    },
}
TREES = {
    "chain": Tree.chain(3),
    "wide": Tree.from_paths(
        [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0)]
    ),
}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.load(str(BASE))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(str(BASE), torch.float32, "cpu")


@pytest.fixture(scope="module")
def grammars(chat: Chat, backbone: Backbone) -> Grammars:
    return Grammars(chat.tokenizer, backbone.vocab_size, backbone.eos_ids)


def start(grammars: Grammars, wanted: Grammar) -> Matcher:
    return asyncio.run(grammars.start(wanted))


def texts_of(engine: Engine, chat: Chat, requests: list[Request]) -> list[tuple[str, str | None, list[int]]]:
    sequences = [engine.add(request) for request in requests]
    while not all(sequence.finish_reason for sequence in sequences):
        engine.step()
    return [(chat.text(s.token_ids), s.finish_reason, s.token_ids) for s in sequences]


def requests_for(grammars: Grammars, chat: Chat, temperature: float) -> list[Request]:
    """One for each schema, with a seed of its own."""
    requests = []
    for i, (name, schema) in enumerate(SCHEMAS.items()):
        prompt = chat.prompt_ids([{"role": "user", "content": f"{i}: give me {name} as JSON"}])
        matcher = start(grammars, grammar.of_json_schema(schema))
        requests.append(Request(prompt, 120, temperature=temperature, seed=i, allowed_tokens=matcher))
    return requests


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_valid_json_and_the_baselines_with_any_tree(
    backbone: Backbone, chat: Chat, grammars: Grammars, temperature: float
) -> None:
    """A mask from the wrong node still gives JSON most of the time, and another one than the baseline's."""
    plain = texts_of(Engine(backbone, None, None, 16, 256), chat, requests_for(grammars, chat, temperature))
    for (text, reason, _), schema in zip(plain, SCHEMAS.values(), strict=True):
        assert reason == "stop", text
        jsonschema.validate(json.loads(text), schema)

    for tree in TREES.values():
        torch.manual_seed(1)
        made_up = MedusaHeads(
            num_heads=3,
            num_layers=1,
            hidden_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            layout="own",
        ).eval()
        oracle: Any = OracleHeads(backbone.hidden_size, backbone.vocab_size, skill=0.8)
        for heads in (made_up, oracle):
            engine = Engine(backbone, heads, tree, 16, 256)
            requests = requests_for(grammars, chat, temperature)
            oracle.engine = engine
            oracle.replies = {
                tuple(r.prompt_ids): ids for r, (_, _, ids) in zip(requests, plain, strict=True)
            }
            assert texts_of(engine, chat, requests) == plain
        assert engine.counters.num_accepted_tokens > 100  # the last one's, the oracle's


def test_a_reply_that_is_cut_is_the_beginning_of_the_whole_one(
    backbone: Backbone, chat: Chat, grammars: Grammars
) -> None:
    engine = Engine(backbone, None, None, 16, 256)
    prompt = chat.prompt_ids([{"role": "user", "content": "JSON"}])
    wanted = grammar.of_json_schema(SCHEMAS["nested"])
    (whole, _, ids), (cut, reason, _) = texts_of(
        engine, chat, [Request(prompt, n, allowed_tokens=start(grammars, wanted)) for n in (120, 12)]
    )
    assert len(ids) > 12
    assert reason == "length"
    assert whole.startswith(cut)
    assert cut != whole


def test_a_matcher_asked_in_any_order_says_what_a_new_one_says(chat: Chat, grammars: Grammars) -> None:
    """Trees ask here and there; a matcher that goes back too far or not far enough is wrong for the next node only."""
    wanted, rng = grammar.of_json_schema(PERSON), random.Random(0)
    texts = ['{"name": "ab", "age": 12}', '{"name":"Zoë", "age": 0}', '{ "name": "", "age" : 1234 }']
    rows = [chat.text_ids(text, add_special_tokens=False) for text in texts]
    old = start(grammars, wanted)
    for _ in range(300):
        row = rng.choice(rows)
        asked = row[: rng.randint(0, len(row))]
        assert old(list(asked)).equal(start(grammars, wanted)(asked))
    assert old.failure is None


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (grammar.of_json_schema(PERSON), '{"name": "ab", "age": 12}'),
        (grammar.of_json_schema(True), "[1]"),
        (grammar.of_regex("(ab)+c|x.*y"), "xaby"),
        (grammar.of_choices(["yes", "no way", 'a "b"\n\\']), 'a "b"\n\\'),
        (grammar.of_calls([("f", PERSON), ("g", {})]), '{"name": "g", "arguments": {"x": 1}}'),
        (
            grammar.of_calls([("f", {})], True),
            '[{"name": "f", "arguments": 1}, {"name": "f", "arguments": 2}]',
        ),
    ],
)
def test_a_reply_may_end_where_it_is_whole_and_special_tokens_are_never_text(
    chat: Chat, grammars: Grammars, wanted: Grammar, text: str
) -> None:
    ids, end = chat.text_ids(text, add_special_tokens=False), chat.tokenizer.eos_token_id
    special = [t for t in chat.tokenizer.all_special_ids if t != end]
    matcher = start(grammars, wanted)
    for i, token in enumerate(ids):
        allowed_V = matcher(ids[:i])
        assert allowed_V[token]
        assert not allowed_V[special].any()
        if not text.startswith("x"):  # what matches x.*y may end in the middle
            assert not allowed_V[end]
    assert matcher(ids)[end]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (grammar.of_choices(["a<|end|>b"]), "a<|end|>b"),
        (grammar.of_regex(r"a<\|end\|>b"), "a<|end|>b"),
        (grammar.of_json_schema({"const": "a<|end|>b<|user|>"}), '"a<|end|>b<|user|>"'),
        (grammar.of_calls([("f", {"const": "<|end|>"})]), '{"name": "f", "arguments": "<|end|>"}'),
    ],
)
def test_the_text_of_a_special_token_stays_text(
    chat: Chat, grammars: Grammars, wanted: Grammar, text: str
) -> None:
    """llguidance tokenizes text that a grammar leaves no choice in; a special token found there ends the reply."""
    matcher, ids = start(grammars, wanted), list[int]()
    while not matcher(ids)[chat.tokenizer.eos_token_id]:
        ids.append(int(matcher(ids).nonzero()[-1]))
    assert chat.tokenizer.decode(ids) == text
    assert not set(ids) & set(chat.tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("make", "given", "says"),
    [
        (grammar.of_json_schema, {"type": "wizard"}, "wizard"),
        (grammar.of_json_schema, {"not": {}}, 'Unimplemented keys: ["not"]'),
        (grammar.of_json_schema, 7, "of type int; expected an object"),
        (grammar.of_json_schema, {"$ref": "#/nowhere"}, "/nowhere"),
        (grammar.of_json_schema, {"$ref": "http://127.0.0.1:1/x"}, "does not fetch"),
        (grammar.of_json_schema, {"$ref": "#"}, "no text|NoExtension|Unsatisfiable"),
        (grammar.of_json_schema, {"enum": []}, "Unsatisfiable"),
        (grammar.of_json_schema, {"type": "string", "pattern": "(?=a)"}, "look-around"),
        (grammar.of_json_schema, {"enum": ["x" * 70_000]}, "characters; expected at most 65536"),
        (grammar.of_json_schema, {"x-guidance": {}}, "x-guidance"),
        (grammar.of_json_schema, {"type": "integer", "multipleOf": 999_983}, "multipleOf is 999983"),
        (
            grammar.of_json_schema,
            {"allOf": [{"type": "integer", "multipleOf": n} for n in (997, 991, 983)]},
            "all of them multiplied",
        ),
        (grammar.of_regex, "(", "regex"),
        (grammar.of_regex, "a" * 5000, "5000 characters; expected at most 4096"),
        (grammar.of_regex, "(?=a)b", "look-around"),
        (grammar.of_choices, [], "0 choices"),
        (grammar.of_choices, ["a", ""], "none of them empty"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    grammars: Grammars, make: Any, given: Any, says: str
) -> None:
    with pytest.raises(GrammarError, match=says.replace("[", r"\[").replace("(?", r"\(?")):
        start(grammars, make(given))


def nested(kind: str, depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = (
            {"type": "array", "items": schema} if kind == "array" else {"anyOf": [schema, {"type": "null"}]}
        )
    return schema


HOSTILE: dict[str, Any] = {
    "deep": lambda: grammar.of_json_schema(nested("array", 2000)),
    "deep unions": lambda: grammar.of_json_schema(nested("anyOf", 20)),
    "wide": lambda: grammar.of_json_schema(
        {
            "type": "object",
            "properties": {f"k{i}": {"type": "string", "pattern": "^a{1,50}$"} for i in range(900)},
        }
    ),
    "products": lambda: grammar.of_json_schema(
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {}}} for i in range(8)]}
                for j in range(8)
            ]
        }
    ),
    "long strings": lambda: grammar.of_json_schema({"type": "string", "minLength": 10**6}),
    "many items": lambda: grammar.of_json_schema({"type": "array", "minItems": 10**6}),
    "repeats": lambda: grammar.of_regex("(((.{1,1000}){1,1000}){1,1000}){1,1000}"),
    "states": lambda: grammar.of_regex("(a|b)*a(a|b){30}"),
    "brackets": lambda: grammar.of_regex("(" * 2000 + "a" + ")" * 2000),
    "letters": lambda: grammar.of_regex(r"(\p{L}{1,200}\p{N}{1,200}){1,200}"),
    "multiples": lambda: grammar.of_json_schema({"type": "integer", "multipleOf": 9973}),
    "digits": lambda: grammar.of_json_schema({"type": "number", "multipleOf": 1e-300}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_followed_in_bounded_time(
    backbone: Backbone, chat: Chat, grammars: Grammars, name: str
) -> None:
    started = time.monotonic()
    try:
        matcher = start(grammars, HOSTILE[name]())
    except GrammarError:
        assert time.monotonic() - started < 6
        return
    ids: list[int] = []
    rng, end = random.Random(0), chat.tokenizer.eos_token_id
    while len(ids) < 200:
        allowed = [t for t in matcher(ids).nonzero().flatten().tolist() if t != end]
        if not allowed:
            break
        ids.append(rng.choice(allowed))
    assert time.monotonic() - started < 10


def test_a_grammar_that_gives_up_ends_its_own_reply_and_no_other(
    backbone: Backbone, chat: Chat, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matchers refuse work beyond their limits at any step. Raised there, it would end every request."""
    broken = start(grammars, grammar.of_regex("a{40}"))
    good = start(grammars, grammar.of_json_schema(PERSON))
    after = broken._after

    def give_up(token_ids: list[int]) -> torch.Tensor:
        if len(token_ids) >= 3:
            raise GrammarError("too complex")
        return after(token_ids)

    monkeypatch.setattr(broken, "_after", give_up)
    prompt = chat.prompt_ids([{"role": "user", "content": "x"}])
    engine = Engine(backbone, None, None, 16, 256)
    (_, reason, ids), (text, _, _) = texts_of(
        engine, chat, [Request(prompt, 60, allowed_tokens=matcher) for matcher in (broken, good)]
    )
    assert (reason, len(ids)) == ("stop", 3)
    assert broken.failure == "too complex"
    jsonschema.validate(json.loads(text), PERSON)


def test_a_grammar_is_compiled_once_and_forgotten_when_many_others_were_used_since(chat: Chat) -> None:
    few = Grammars(chat.tokenizer, 1024, [2])
    wanted = [grammar.of_regex(f"a{{{i}}}") for i in range(1, grammar.NUM_KEPT + 3)]
    start(few, wanted[0])
    kept = few._kept[wanted[0]]
    start(few, wanted[0])
    assert few._kept[wanted[0]] is kept
    for other in wanted[1:]:
        start(few, other)
    assert wanted[0] not in few._kept
    assert len(few._kept) == grammar.NUM_KEPT


def test_a_vocabulary_that_is_no_multiple_of_a_word_and_larger_than_the_tokenizers_is_masked_whole(
    tiny_base: Path,
) -> None:
    chat = Chat.load(str(tiny_base))
    for vocab_size in (262, 300):
        matcher = start(Grammars(chat.tokenizer, vocab_size, [2, 5]), grammar.of_regex("a*"))
        allowed = matcher([]).nonzero().flatten().tolist()
        assert matcher([]).shape == (vocab_size,)
        assert sorted(allowed) == sorted([2, 5, *chat.text_ids("a")])


def test_a_base_without_an_end_of_sequence_token_says_so(chat: Chat) -> None:
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        start(Grammars(chat.tokenizer, 1024, []), grammar.of_regex("a"))


def test_a_node_costs_microseconds_however_long_the_reply_is(chat: Chat, grammars: Grammars) -> None:
    """Were the reply read again for each node, a token at its end would cost a hundred times one at its start."""
    matcher = start(grammars, grammar.of_json_schema({"type": "string"}))
    token = chat.text_ids("a", add_special_tokens=False)
    reply = chat.text_ids('"', add_special_tokens=False) + token * 2000
    matcher(reply)
    started = time.perf_counter()
    for _ in range(100):
        for depth in (1, 2, 3):
            matcher(reply + token * depth)
    per_node_s = (time.perf_counter() - started) / 300
    assert per_node_s < 1e-3  # measured 4e-5
