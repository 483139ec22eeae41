"""Functions that a model may call -> the text that tells it of them, and the text of its replies -> calls.

Chat templates that know tools are given them as they are. For the others all is written out as Hermes and Qwen do:
functions between <tools> tags in the system text, calls between <tool_call> tags, results between <tool_response>.
"""

import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
SYSTEM_TEXT = """# Tools

You may call one or more functions to assist with the user query. Their signatures are within <tools></tools> tags:
<tools>
{}
</tools>

For each call return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def written_out(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages and tools as messages of system, user and assistant with nothing but text."""
    plain = [_written_out(message) for message in messages]
    if not tools:
        return plain
    text = SYSTEM_TEXT.format("\n".join(_dump(tool) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _written_out(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    functions = [call["function"] for call in message.get("tool_calls", [])]
    calls = [_dump({"name": f["name"], "arguments": f["arguments"]}) for f in functions]
    parts = [message["content"], *(f"{OPEN}\n{call}\n{CLOSE}" for call in calls)]
    return {"role": message["role"], "content": "\n".join(part for part in parts if part)}


@dataclass(frozen=True)
class Call:
    """One call of a function. The arguments are JSON, unless the reply was cut in them."""

    index: int  # among the calls of the reply
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class CallReader:
    """The text of one reply, as it comes -> what of it is for the reader, and the calls in it.

    Two formats are known: JSON objects between <tool_call> tags anywhere (Hermes, Qwen), and a reply that is nothing
    but JSON objects, `parameters` for `arguments`, a `;` between two (Llama 3.1). Text that may be a call is held back
    until that is known, and is shown after all where it is none: where the JSON is broken or no such function exists.
    """

    def __init__(self, names: Collection[str], is_forced: bool = False) -> None:
        """names: of the functions there are. is_forced: a grammar sees to it that the reply is calls alone, an object
        or a list of them, so that one that was cut is a call as well."""
        self._names, self._is_forced = names, is_forced
        self._held = ""
        self._has_begun = False  # with text or a call
        self.calls: list[Call] = []

    def push(self, text: str) -> str:
        """The text that may be shown; calls join `calls`."""
        self._held += text
        if self._is_forced or (not self._has_begun and self._held.lstrip()[:1] in ("", "{")):
            return ""
        shown = ""
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            shown += self._show(before)
            self._held = OPEN + rest
            if CLOSE not in rest:
                return shown
            inside, _, self._held = rest.partition(CLOSE)
            if not self._take(inside):
                shown += self._show(OPEN + inside + CLOSE)
        num_held = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        text, self._held = self._held[: len(self._held) - num_held], self._held[len(self._held) - num_held :]
        return shown + self._show(text)

    def finish(self) -> str:
        """What is held back when the reply ends, unless it is calls."""
        text, self._held = self._held, ""
        if self._is_forced:
            self._take_forced(text)
            return ""
        is_calls = not self._has_begun and self._take(text)
        return "" if is_calls else self._show(text)

    def _show(self, text: str) -> str:
        """Text, but for the white space around calls."""
        if self.calls and not text.strip():
            return ""
        self._has_begun |= bool(text)
        return text

    def _take(self, text: str) -> bool:
        """Takes JSON objects with a `;` or nothing between them for calls, if all of them are some."""
        found: list[tuple[str, str]] = []
        while text := text.lstrip(" \t\r\n;"):
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                return False
            call = self._as_call(value)
            if call is None:
                return False
            found.append(call)
            text = text[end:]
        for name, arguments in found:
            self._add(name, arguments)
        return bool(found)

    def _as_call(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return (value["name"], _dump(arguments)) if isinstance(arguments, dict) else None

    def _take_forced(self, text: str) -> None:
        """Calls as grammar.of_calls has them written, the last of them cut perhaps."""
        text = text.removeprefix("[")
        while start := re.match(r'(?:, )?\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ', text):
            name, text = json.loads(start[1]), text[start.end() :]
            try:
                _, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                end = len(text)
            self._add(name, text[:end])
            text = text[end:].removeprefix("}")

    def _add(self, name: str, arguments: str) -> None:
        self._has_begun = True
        self.calls.append(Call(len(self.calls), name, arguments))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
