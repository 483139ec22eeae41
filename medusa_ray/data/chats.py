"""A row of any known shape -> its chat, its id, and why it cannot be used, if so.

A chat is a list of messages, or bare text, or {"prompt", "completion"} of bare text.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
SHAPES = ("messages", "conversations", "prompt", "text")
EXPECTED = (
    'Expected {"messages": [{"role", "content"}, ...]}, a bare list of messages, {"conversations": [{"from", "value"}, '
    '...]}, {"prompt", "completion"}, {"prompt"} or {"text"}; a source\'s `columns` tell of other names.'
)


class Refusal(Exception):
    """A file that is no file of chats: what the message says before the row's number, the number, and after it."""

    def __init__(self, before: str, number: int | None = None, after: str = "") -> None:
        super().__init__(before, number, after)
        self.before, self.number, self.after = before, number, after


@dataclass(frozen=True)
class Fault:
    """A row that was read, but is no value; its content tells it from others."""

    reason: str
    content: str


@dataclass(frozen=True)
class Row:
    """One chat of a file."""

    number: int  # line or row, from 1
    given_id: str | None
    content: bytes  # digest of the chat, 32 bytes
    text: str  # JSON of the chat
    error: str | None

    @property
    def id(self) -> str:
        """Without an id of its own a chat is named by its content."""
        return self.given_id or self.content.hex()[:16]


def row_of(number: int, value: Any, file: str) -> Row:
    """Raises Refusal for a row that is no chat."""
    chat, given_id, error = parse(value, file, number)
    text = json.dumps(chat, sort_keys=True, default=str)
    row_id = None if given_id in (None, "") else str(given_id)
    if row_id and (fault := fault_of_text(row_id, "the id")):
        row_id, error = None, error or fault
    return Row(number, row_id, hashlib.sha256(text.encode()).digest(), text, error)


def parse(value: Any, file: str, number: int) -> tuple[Any, Any, str | None]:
    """The chat, its id if it has one, and why it cannot be used, if so. Raises Refusal for another shape."""
    if isinstance(value, bytes):
        return value.hex(), None, "not UTF-8"
    if isinstance(value, Fault):
        return value.content, None, value.reason
    if isinstance(value, list):
        return value, None, fault_of_messages(value)
    shape = None
    if isinstance(value, dict):
        present = [name for name in SHAPES if name in value]
        # A table has every column in every row.
        shape = next((name for name in present if value[name] is not None), present[0] if present else None)
    if shape is None:
        found = (
            f"the keys {sorted(map(str, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
        )
        raise Refusal(f"{file} row ", number, f" has no messages, but {found}. {EXPECTED}")
    chat, row_id = value[shape], value.get("id")
    if shape == "conversations" and isinstance(chat, list):
        chat = [_from_sharegpt(message) for message in chat]
    if shape in ("messages", "conversations"):
        return chat, row_id, fault_of_messages(chat)
    completion = value.get("completion") if shape == "prompt" else None
    if isinstance(chat, list) and shape == "prompt":
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        chat = chat + answer if isinstance(answer, list) else chat
        return chat, row_id, fault_of_messages(chat)
    fault = fault_of_text(chat, f"the {shape}")
    if completion is None:
        return chat, row_id, fault
    return (
        {"prompt": chat, "completion": completion},
        row_id,
        fault or fault_of_text(completion, "the completion"),
    )


def text_of(chat: Any) -> str:
    """All that is said in a good chat, a line for each message."""
    if isinstance(chat, dict):
        return f"{chat['prompt']}\n{chat['completion']}"
    return chat if isinstance(chat, str) else "\n".join(message["content"] for message in chat)


def prompt_text_of(chat: Any) -> str:
    """What the user says in a good chat."""
    if isinstance(chat, dict):
        return str(chat["prompt"])
    if isinstance(chat, str):
        return chat
    return "\n".join(message["content"] for message in chat if message["role"] == "user")


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        return message
    role = message["from"]
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message.get("value")}


def fault_of_messages(messages: Any) -> str | None:
    if not messages:
        return "no messages"
    if not isinstance(messages, list):
        return f"wrong type: messages is a {type(messages).__name__}, expected a list"
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"wrong type: message {i} is a {type(message).__name__}, expected role and content"
        if message.get("role") not in ROLES:
            return (
                f"wrong role: message {i} has the role {message.get('role')!r}, expected {', '.join(ROLES)}"
            )
        fault = fault_of_text(message.get("content"), f"the content of message {i}")
        if fault and not (message["role"] == "system" and message.get("content") == ""):
            return fault
    return _fault_of_order([message["role"] for message in messages])


def _fault_of_order(roles: list[str]) -> str | None:
    """Templates render turns in any order, most of them, but no model was trained on all of it."""
    for i, role in enumerate(roles):
        before = roles[i - 1] if i else "the start"
        is_known = {
            "system": before in ("the start", "system"),
            "user": before != "user",
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }
        if not is_known[role]:
            return f"wrong order: message {i} is of role {role} after {before}"
    return None


def fault_of_text(text: Any, name: str) -> str | None:
    if isinstance(text, bytes):
        return f"not UTF-8: {name} has bytes that are none"
    if not isinstance(text, str):
        return f"wrong type: {name} is a {type(text).__name__}, expected text"
    if not text.strip():
        return f"empty: {name} has no text"
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text.encode(errors="surrogateescape")  # how readers keep bytes that are not UTF-8
        except UnicodeEncodeError:
            return f"not Unicode: {name} has half of a surrogate pair"
        return f"not UTF-8: {name} has bytes that are none"
    return None
