"""The OpenAI protocol without a server: what is accepted, what is refused and why, what a stream holds."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_heads import OracleHeads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_ray import openai_api
from medusa_ray.chat import Chat
from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.scheduler import Request
from medusa_ray.medusa.tree import Tree
from medusa_ray.openai_api import ApiError, ChatRequest, CompletionRequest, Envelope, Reply
from medusa_ray.openai_api.replies import metrics, usage

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Characters:
    """A detokenizer whose tokens are code points; 0 is half a character, which the next token completes."""

    def __init__(self) -> None:
        self.half = ""

    def push(self, token_ids: list[int]) -> str:
        text = ""
        for token in token_ids:
            self.half, text = ("half-", text) if token == 0 else ("", text + self.half + chr(token))
        return text

    def finish(self) -> str:
        return "\ufffd" if self.half else ""

    def token_text(self, token_id: int) -> str:
        return chr(token_id) if token_id else "\ufffd"


def refusal(kind: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        openai_api.parse(
            kind, json.dumps({**CHAT, "prompt": None, **fields} if kind is ChatRequest else fields).encode()
        )
    return caught.value


def reply_to(
    steps: list[list[int]], stop: list[str], finish_reason: str = "length"
) -> tuple[list[str], Reply]:
    """The texts that a reply of these steps shows, up to the step that ends it."""
    reply = Reply(Characters(), stop, num_prompt_tokens=5, num_nodes=3)
    texts = []
    for i, step in enumerate(steps):
        texts.append(reply.push(Delta(step, finish_reason if i == len(steps) - 1 else None, i, [i])))
        if reply.finish_reason:
            break
    return texts, reply


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


# ------------------------------------------------------------------------------------------------- requests


def test_what_guidellm_sends_is_accepted() -> None:
    """A refused extra field would end a benchmark before its first request."""
    request = openai_api.parse(
        ChatRequest,
        json.dumps(
            {
                "model": "m",
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
                    }
                ],
                "max_completion_tokens": 48,
                "stop": None,
                "ignore_eos": True,
                "temperature": None,
            }
        ).encode(),
    )
    assert request.chat == [{"role": "user", "content": "one two"}]
    assert (request.num_wanted, request.stop, request.ignore_eos) == (48, [], True)


def test_fields_that_change_nothing_are_accepted() -> None:
    fields = {
        "n": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "logprobs": False,
        "top_logprobs": 0,
        "min_p": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "reasoning_effort": None,
    }
    openai_api.parse(ChatRequest, json.dumps({**CHAT, **fields}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("suffix", "x"),
        ("echo", True),
        ("guided_regex", "a+"),
        ("no_such_field", 1),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str, value: Any) -> None:
    """Ignored, they would give an answer that looks right and is not what was asked for."""
    error = refusal(ChatRequest, **{field: value})
    assert error.status == 400
    assert error.body["error"]["param"] == field
    assert f"{field} is not supported" in str(error)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("messages", [], "at least 1 item"),
        ("messages", [{"role": "wizard", "content": "x"}], "messages.0.role is 'wizard'"),
        ("messages", [{"role": "user", "content": None}], "messages.0.content is None"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        (
            "messages",
            [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "messages.0.tool_calls.0.function is missing",
        ),
        ("messages", "hello", "messages is 'hello'"),
        ("n", 9, "n is 9: Input should be less than or equal to 8"),
        ("temperature", -0.1, "temperature is -0.1: Input should be greater than or equal to 0"),
        ("temperature", 2.5, "less than or equal to 2"),
        ("temperature", "warm", "temperature is 'warm'"),
        ("top_p", 0, "top_p is 0: Input should be greater than 0"),
        ("top_p", 1.5, "less than or equal to 1"),
        ("top_k", -2, "top_k is -2"),
        ("top_k", 2**31, "top_k is 2147483648"),
        ("min_p", 1.5, "min_p is 1.5: Input should be less than or equal to 1"),
        ("presence_penalty", 2.5, "presence_penalty is 2.5: Input should be less than or equal to 2"),
        ("frequency_penalty", -3, "frequency_penalty is -3"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
        ("logit_bias", {"5": 101}, "logit_bias.5 is 101"),
        ("logit_bias", {"five": 1}, "logit_bias.five"),
        ("logit_bias", [5], "logit_bias is [5]"),
        ("logprobs", 3, "logprobs is 3: Input should be a valid boolean"),
        ("top_logprobs", 3, "top_logprobs is 3: Value error, it needs logprobs: true"),
        ("top_logprobs", 21, "top_logprobs is 21"),
        ("acceptance", "fast", "acceptance is 'fast'"),
        ("speculates", 0, "speculates is 0: Input should be a valid boolean"),
        ("deadline_s", 0, "deadline_s is 0: Input should be greater than 0"),
        ("deadline_s", "soon", "deadline_s is 'soon'"),
        ("max_tokens", 0, "max_tokens is 0: Input should be greater than or equal to 1"),
        ("max_completion_tokens", -1, "max_completion_tokens is -1"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("seed", -1, "seed is -1"),
        ("stop", [""], "0 characters; expected 1 to 256"),
        ("stop", ["x" * 257], "257 characters"),
        ("stop", [1], "stop.0 is 1"),
        ("stream", "yes", "stream is 'yes'"),
        ("stream_options", {"include_use": True}, "stream_options.include_use is not supported"),
        ("model", 7, "model is 7"),
    ],
)
def test_values_out_of_range_are_refused_with_field_value_and_limit(
    field: str, value: Any, says: str
) -> None:
    error = refusal(ChatRequest, **{field: value})
    assert error.status == 400
    assert says in str(error)
    assert error.body["error"]["type"] == "invalid_request_error"
    assert str(error.body["error"]["param"]).startswith(field)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"a": 1}, "prompt is"),
        ([1.5], "prompt"),
        ([], "prompt is []"),
        (None, "prompt is None"),
        ([[1], "a"], "prompt."),
    ],
)
def test_prompts_of_another_kind_or_too_many_are_refused(prompt: Any, says: str) -> None:
    error = refusal(CompletionRequest, model="m", prompt=prompt)
    assert error.status == 400
    assert says in str(error)


@pytest.mark.parametrize("prompt", ["text", ["text"], [5, 6], [[5, 6]]])
def test_a_batch_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    request = openai_api.parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert request.prompt in (["text"], [[5, 6]])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "m"}',
        b'{"a":' * 10_000,
        b'{"model": "\\ud800", "messages": 1}',
    ],
)
def test_bodies_that_are_no_request_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        openai_api.parse(ChatRequest, body)
    assert caught.value.status == 400


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw builds tables
@given(
    st.dictionaries(
        st.sampled_from([*ChatRequest.model_fields, *ChatRequest.neutral, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_json_is_a_request_or_is_refused(fields: dict[str, Any]) -> None:
    """Any other exception than an ApiError would be a 500."""
    with contextlib.suppress(ApiError):
        openai_api.parse(ChatRequest, json.dumps({**CHAT, **fields}).encode())


def test_a_reply_that_does_not_fit_names_both_numbers() -> None:
    request = openai_api.parse(ChatRequest, json.dumps({**CHAT, "max_tokens": 20}).encode())
    with pytest.raises(
        ApiError, match=r"has 90 tokens and max_tokens is 20, together 110.* may have 100.* at most 10"
    ):
        openai_api.num_new_tokens(request, 90, max_input_tokens=99, max_total_tokens=100)
    with pytest.raises(ApiError, match=r"has 51 tokens, but at most 50 \(max_input_tokens\)"):
        openai_api.num_new_tokens(request, 51, max_input_tokens=50, max_total_tokens=100)
    with pytest.raises(ApiError, match="empty"):
        openai_api.num_new_tokens(request, 0, max_input_tokens=99, max_total_tokens=100)
    assert openai_api.num_new_tokens(request, 80, max_input_tokens=99, max_total_tokens=100) == 20


def test_without_max_tokens_chat_may_fill_the_model_and_completions_get_openais_sixteen() -> None:
    chat = openai_api.parse(ChatRequest, json.dumps(CHAT).encode())
    completion = openai_api.parse(CompletionRequest, b'{"model": "m", "prompt": "x"}')
    assert openai_api.num_new_tokens(chat, 30, 99, 100) == 70
    assert openai_api.num_new_tokens(completion, 30, 99, 100) == 16


# ------------------------------------------------------------------------------------------------- replies


def test_a_stop_string_over_several_steps_is_never_shown() -> None:
    texts, reply = reply_to(
        [ids("SEL"), ids("ECT 1;"), ids("\nEN"), ids("D; more"), ids("never")], stop=["\nEND"]
    )
    assert texts == ["SEL", "ECT 1;", "", ""]
    assert reply.finish_reason == "stop"
    assert reply.num_tokens == len(
        "SELECT 1;\nEND"
    )  # what the last step has after the stop string does not count


def test_what_only_looked_like_a_stop_string_is_shown_after_all() -> None:
    texts, reply = reply_to([ids("a<e"), ids("nd"), ids("or>b<"), ids("en")], stop=["<end>"])
    assert "".join(texts) == "a<endor>b<en"
    assert texts[:2] == ["a", ""]
    assert reply.finish_reason == "length"


@settings(deadline=None)
@given(
    st.text("ab<", max_size=20),
    st.lists(st.text("ab<", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_however_steps_fall_the_text_ends_before_the_first_complete_stop_string(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    """Held-back text that is lost or shown too early only differs by a few characters at odd places."""
    token_ids, steps = ids(text), []
    for size in sizes:
        steps.append(token_ids[:size])
        token_ids = token_ids[size:]
    shown, reply = reply_to([step for step in steps if step] or [[]], stop)

    first_end = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    if first_end is None:
        assert ("".join(shown), reply.finish_reason, reply.num_tokens) == (text, "length", len(text))
    else:
        start = min(at for s in stop if (at := text[:first_end].find(s)) >= 0)
        assert ("".join(shown), reply.finish_reason, reply.num_tokens) == (text[:start], "stop", first_end)


def test_a_character_split_over_steps_comes_whole() -> None:
    texts, _ = reply_to([[0], ids("x"), [0]], stop=[])
    assert texts == ["", "half-x", "\ufffd"]
    texts, _ = reply_to([[0], ids("x"), [0]], stop=["stop"])
    assert texts == ["", "half-x", "\ufffd"]


@pytest.mark.parametrize("stop", [[], ["<end>"]])
@pytest.mark.parametrize(
    "text",
    ["héllo", "\u65e5\u672c", "\U0001f469\u200d\U0001f467 joined", "e\u0301", "\u0645\u0631", "a\x00b"],
)
def test_unicode_in_single_bytes_comes_out_as_it_went_in(tiny_base: Path, text: str, stop: list[str]) -> None:
    """Each token of this tokenizer is one byte, so every character is split over as many steps as bytes."""
    chat = Chat.load(str(tiny_base))
    token_ids = chat.text_ids(text)
    reply = Reply(chat.detokenizer(), stop, 1, 0)
    shown = [
        reply.push(Delta([token], "length" if i == len(token_ids) - 1 else None, i, []))
        for i, token in enumerate(token_ids)
    ]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_usage_and_metrics_count_guesses_as_vllm_does() -> None:
    reply = Reply(Characters(), [], num_prompt_tokens=5, num_nodes=3)
    reply.push(Delta(ids("a"), None, 0, []))
    reply.push(Delta(ids("bcd"), None, 1, [0, 0, 1], 3))
    reply.push(Delta(ids("e"), "length", 2, [1, 0, 1], 6))
    assert usage([reply]) == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "completion_tokens_details": {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 4},
    }
    assert metrics([reply])["speculative_decoding"] == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": pytest.approx(1 / 3),
        "acceptance_histogram": [1, 0, 1],
        "num_spec_steps": 2,
        "num_accepted_draft_tokens": 2,
        "num_draft_tokens": 6,
        "num_spec_tokens": 3,
    }


def test_a_reply_of_one_token_has_metrics_without_dividing_by_zero() -> None:
    reply = Reply(Characters(), [], num_prompt_tokens=5, num_nodes=0)
    reply.push(Delta(ids("a"), "length", 0, []))
    assert metrics([reply])["speculative_decoding"]["mean_acceptance_length"] == 1.0
    assert metrics([reply])["speculative_decoding"]["draft_acceptance_rate"] == 0.0


# ------------------------------------------------------------------------------------------------- responses


def streamed(kind: Any, request: dict[str, Any], steps: list[list[int]]) -> list[dict[str, Any]]:
    envelope = Envelope(openai_api.parse(kind, json.dumps(request).encode()))
    reply = Reply(Characters(), [], 5, 3)
    written = "".join(
        envelope.events(reply.push(Delta(step, "stop" if i == len(steps) - 1 else None, i, [i])), reply)
        for i, step in enumerate(steps)
    )
    *events, done, rest = written.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream_has_one_event_per_step_and_the_role_once() -> None:
    """A client that concatenates deltas, as OpenAI's does, would get the role as often as it is sent."""
    events = streamed(ChatRequest, CHAT, [ids("a"), ids("bcd"), [0], ids("e")])
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": "a"},
        {"content": "bcd"},
        {"content": "half-e"},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert "usage" not in events[0]


def test_usage_comes_last_or_with_every_event_as_asked() -> None:
    options: dict[str, Any] = {"include_usage": True}
    *events, last = streamed(ChatRequest, {**CHAT, "stream_options": options}, [ids("a"), ids("bc")])
    assert [event["usage"] for event in events] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 1

    options["continuous_usage_stats"] = True
    *events, last = streamed(ChatRequest, {**CHAT, "stream_options": options}, [ids("a"), ids("bc")])
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 3]


def test_text_completions_stream_text() -> None:
    events = streamed(CompletionRequest, {"model": "m", "prompt": "x"}, [ids("a"), ids("bc")])
    assert [(e["object"], e["choices"][0]["text"]) for e in events] == [
        ("text_completion", "a"),
        ("text_completion", "bc"),
    ]


def test_a_stream_that_ends_without_text_still_says_why() -> None:
    events = streamed(ChatRequest, CHAT, [ids("a"), []])
    assert events[-1]["choices"][0] == {
        "index": 0,
        "delta": {"content": ""},
        "logprobs": None,
        "finish_reason": "stop",
    }


# ------------------------------------------------------------------------------------------------- logprobs


def logprob_events(
    kind: Any, request: dict[str, Any], stop: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events with choices of a stream, and the body of the same reply as a whole."""
    steps = [ids("a"), [*ids("b<"), 0], ids("cen"), ids("d<e")]
    parsed = openai_api.parse(kind, json.dumps(request).encode())
    stream, whole = Envelope(parsed), Envelope(parsed)
    replies = [Reply(Characters(), stop, 5, 3) for _ in range(2)]
    written = ""
    for i, step in enumerate(steps):
        logprobs = [Logprob(t, -t / 10, [(t, -t / 10), (0, -20.0), (0, -30.0)]) for t in step]
        delta = Delta(step, "length" if i == len(steps) - 1 else None, i, [i], logprobs=logprobs)
        written += stream.events(replies[0].push(delta), replies[0])
        whole.add(replies[1].push(delta), replies[1])
        if replies[1].finish_reason:
            break
    events = [json.loads(line.removeprefix("data: ")) for line in written.split("\n\n")[:-2]]
    return [event["choices"][0] for event in events], whole.body()["choices"][0]


@pytest.mark.parametrize("stop", [[], ["<e"]])
def test_chats_have_the_logprobs_of_every_token_that_counts_streamed_or_not(stop: list[str]) -> None:
    """Text that is held back holds up no logprobs, and none may be lost or sent twice."""
    events, whole = logprob_events(ChatRequest, {**CHAT, "logprobs": True, "top_logprobs": 2}, stop)
    content = [entry for event in events for entry in event["logprobs"]["content"]]
    assert content == whole["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [*"ab<", "\ufffd", *"cend<e"]
    assert content[1] == {
        "token": "b",
        "logprob": -9.8,
        "bytes": [98],
        "top_logprobs": [
            {"token": "b", "logprob": -9.8, "bytes": [98]},
            {"token": "\ufffd", "logprob": -20.0, "bytes": None},
            {"token": "\ufffd", "logprob": -30.0, "bytes": None},
        ],
    }


def test_tokens_behind_a_stop_string_have_no_logprobs() -> None:
    events, whole = logprob_events(ChatRequest, {**CHAT, "logprobs": True}, ["b<"])
    assert "".join(entry["token"] for entry in whole["logprobs"]["content"]) == "ab<"
    assert "".join(e["token"] for event in events for e in event["logprobs"]["content"]) == "ab<"
    assert whole["message"]["content"] == "a"


def test_text_completions_have_logprobs_in_their_own_shape() -> None:
    events, whole = logprob_events(CompletionRequest, {"model": "m", "prompt": "x", "logprobs": 1}, [])
    assert whole["logprobs"]["tokens"] == [*"ab<", "\ufffd", *"cend<e"]
    assert whole["logprobs"]["token_logprobs"][:2] == [-9.7, -9.8]
    assert whole["logprobs"]["top_logprobs"][0] == {"a": -9.7, "\ufffd": -20.0}
    assert whole["logprobs"]["text_offset"] == list(range(10))
    for key, values in whole["logprobs"].items():
        assert [value for event in events for value in event["logprobs"][key]] == values


def test_logprobs_that_nobody_asked_for_are_null() -> None:
    events, whole = logprob_events(ChatRequest, {**CHAT, "logprobs": False}, [])
    assert whole["logprobs"] is None
    assert {event["logprobs"] for event in events} == {None}


# ------------------------------------------------------------------------------------ stop strings, for real


def test_a_stop_string_cuts_a_reply_with_any_tree_where_it_cuts_the_baselines(tiny_base: Path) -> None:
    """It may begin in one accepted run and end in the next, or both inside one: no token may slip through."""
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    chat = Chat.load(str(tiny_base))
    letters_V = torch.zeros(262, dtype=torch.bool)
    letters_V[chat.text_ids("abcdefgh")] = (
        True  # each is one token; other bytes are only parts of a character
    )
    wants = Request([1, 40, 50, 60], 40, allowed_tokens=lambda _: letters_V)
    alone = Engine(backbone, max_total_tokens=128)
    token_ids = alone.generate([wants.prompt_ids], 40, allowed_tokens=wants.allowed_tokens)[0].token_ids
    text = chat.text(token_ids)
    heads = OracleHeads(32, 262, skill=0.8)
    engine = heads.engine = Engine(
        backbone, heads, Tree.from_paths([(0,), (0, 0), (1,), (0, 0, 0), (1, 0)]), 4, 128
    )
    heads.replies = {tuple(wants.prompt_ids): token_ids}
    sequence, deltas = engine.add(wants), []
    while not sequence.finish_reason:
        deltas += [delta for _, delta in engine.step()]
    assert max(len(delta.token_ids) for delta in deltas) > 2
    for start in range(len(text) - 5):
        for size in (1, 2, 5):
            stop = text[start : start + size]
            cut = text.index(stop)  # a token is a letter
            reply = Reply(chat.detokenizer(), [stop], 4, 5)
            shown = ""
            for delta in deltas:
                shown += reply.push(delta)
                if reply.finish_reason:
                    break
            assert (shown, reply.finish_reason, reply.num_tokens) == (text[:cut], "stop", cut + size)
