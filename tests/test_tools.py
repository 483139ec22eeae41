"""Calls in the text of a reply, however it falls into steps; and tools for templates that know none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_ray import tools
from medusa_ray.chat import Chat
from medusa_ray.tools import CallReader

ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def read(text: str, sizes: list[int] | None = None, **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    """What is shown of a reply and its calls; sizes: characters of each step."""
    reader, shown, start = CallReader(["add", "now"], **options), "", 0
    for size in sizes or [len(text)]:
        shown += reader.push(text[start : start + size])
        start += size
    shown += reader.push(text[start:])
    shown += reader.finish()
    assert [call.index for call in reader.calls] == list(range(len(reader.calls)))
    return shown, [(call.name, call.arguments) for call in reader.calls]


HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": [1], "b": "}<"}}\n</tool_call>'
ADDED = ("add", '{"a": [1], "b": "}<"}')
REPLIES = [
    ("just text < with <tool and {} in it", ("just text < with <tool and {} in it", [])),
    (HERMES, ("", [ADDED])),
    (f"Let me see.\n{HERMES}", ("Let me see.\n", [ADDED])),
    (f'{HERMES}\n<tool_call>{{"name": "now"}}</tool_call>\n', ("", [ADDED, ("now", "{}")])),
    (f"{HERMES} and then", (" and then", [ADDED])),
    ('{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    ('\n{"name": "now", "arguments": {}}; {"name": "add"}', ("", [("now", "{}"), ("add", "{}")])),
    ('{"name": "other", "parameters": {}}', ('{"name": "other", "parameters": {}}', [])),
    ('{"rows": 3}', ('{"rows": 3}', [])),
    ('{"name": "add", "parameters": {"a"', ('{"name": "add", "parameters": {"a"', [])),
    ('{"name": "add", "parameters": [1]}', ('{"name": "add", "parameters": [1]}', [])),
    ("<tool_call>{broken}</tool_call>!", ("<tool_call>{broken}</tool_call>!", [])),
    ('x <tool_call>{"name": "add"', ('x <tool_call>{"name": "add"', [])),
    ("{" * 100_000, ("{" * 100_000, [])),
    ("", ("", [])),
]


@pytest.mark.parametrize(("text", "expected"), REPLIES, ids=range(len(REPLIES)))
def test_calls_are_read_and_all_else_is_text(text: str, expected: Any) -> None:
    assert read(text) == expected


@settings(deadline=None)
@given(
    st.sampled_from([reply for reply in REPLIES if len(reply[0]) < 1000]),
    st.lists(st.integers(1, 9), max_size=60),
)
def test_however_steps_fall_the_same_calls_are_read(reply: Any, sizes: list[int]) -> None:
    """Tags come in pieces; text that is shown too early cannot be taken back."""
    text, expected = reply
    assert read(text, sizes) == expected


def test_where_only_one_call_may_come_the_first_is_it() -> None:
    assert read(f'{HERMES}<tool_call>{{"name": "now"}}</tool_call>', is_single=True) == ("", [ADDED])


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "add", "arguments": {"a": 1}}', [("add", '{"a": 1}')]),
        (
            '[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]',
            [("add", '{"a": 1}'), ("now", "{}")],
        ),
        ('[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "argu', [("add", '{"a": 1}')]),
        ('{"name": "add", "arguments": {"a": "x', [("add", '{"a": "x')]),
        ('{"na', []),
    ],
)
def test_forced_calls_are_read_even_when_cut(text: str, calls: Any) -> None:
    assert read(text, [3, 4, 5], is_forced=True) == ("", calls)


def test_a_template_that_knows_no_tools_is_told_of_them_in_the_system_text(tiny_base: Path) -> None:
    """The base could never answer otherwise, nor could a chat with calls go on."""
    chat = Chat.load(str(tiny_base))
    called = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    plain = tools.written_out(messages, [ADD])
    assert [m["role"] for m in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be brief.\n\n# Tools")
    assert json.dumps(ADD) in plain[0]["content"]
    assert plain[2]["content"] == '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
    assert read(plain[2]["content"]) == ("", [("add", '{"a": "é"}')])
    assert plain[3]["content"] == "<tool_response>\n2\n</tool_response>"
    assert chat.prompt_ids(messages, [ADD]) == chat.prompt_ids(plain)
    assert tools.written_out(messages[1:2], [ADD])[0]["role"] == "system"


def test_a_template_that_knows_tools_gets_them_as_they_are(tiny_base: Path) -> None:
    chat = Chat.load(str(tiny_base))
    chat.tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
    )
    called = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 7}}}
    messages: Any = [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    text = chat.text(chat.prompt_ids(messages, [ADD]))
    assert text == f"{json.dumps([ADD])}7<|tool|>2"
