"""Texts of replies -> OpenAI's JSON bodies, stream events and errors. Each engine step is one event of its choice."""

import itertools
import json
import time
import uuid
from collections import Counter
from typing import Any

from medusa_ray.openai_api.replies import Reply, metrics, usage
from medusa_ray.openai_api.requests import ApiError, ChatRequest, CompletionRequest, StreamOptions
from medusa_ray.tools import Call


class Envelope:
    """The choices of one request, as they come -> the JSON body or the stream events that carry them."""

    def __init__(self, request: ChatRequest | CompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        options = request.stream_options or StreamOptions()
        self._include_usage = bool(options.include_usage)
        self._continuous_usage = bool(options.continuous_usage_stats)
        self._has_logprobs = request.num_logprobs is not None
        self._has_token_ids = bool(request.return_token_ids)
        self._num_choices = request.num_choices  # of each prompt
        num_prompts = 1 if isinstance(request, ChatRequest) else len(request.prompt)
        self._num_open = num_prompts * request.num_choices
        self._replies: dict[int, Reply] = {}
        self._texts: dict[int, list[str]] = {}
        self._num_characters: Counter[int] = Counter()  # of the tokens whose logprobs were sent, by choice
        self.id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._base = {
            "id": self.id,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": self.created,
            "model": request.model,
        }

    def add(self, text: str, reply: Reply) -> None:
        """Takes in a step of a choice, for `body`."""
        self._replies[reply.index] = reply
        self._texts.setdefault(reply.index, []).append(text)

    def body(self) -> dict[str, Any]:
        """The response to a request without streaming, once every choice is whole."""
        replies = [self._replies[index] for index in sorted(self._replies)]
        choices = [self._whole("".join(self._texts[reply.index]), reply) for reply in replies]
        used = usage(replies, self._num_choices)
        return {**self._base, "choices": choices, "usage": used, "metrics": metrics(replies)}

    def _whole(self, text: str, reply: Reply) -> dict[str, Any]:
        if not self._is_chat:
            return {"index": reply.index, "text": text, **self._end(reply)}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls := reply.take_calls():
            message |= {"content": text or None, "tool_calls": [_as_dict(call) for call in calls]}
        return {"index": reply.index, "message": message, **self._end(reply)}

    def events(self, text: str, reply: Reply) -> str:
        """The stream events of one step: none when it shows nothing, the closing ones with the last."""
        is_first, has_ended = reply.index not in self._replies, reply.finish_reason is not None
        calls = reply.take_calls()
        if not (text or calls or has_ended):
            return ""
        self._replies[reply.index] = reply
        written = self._event([self._choice(text, calls, reply, is_first)], self._continuous_usage)
        self._num_open -= has_ended
        if self._num_open:
            return written
        if self._include_usage:
            written += self._event([], True, metrics=metrics(list(self._replies.values())))
        return written + "data: [DONE]\n\n"

    def _choice(self, text: str, calls: list[Call], reply: Reply, is_first: bool) -> dict[str, Any]:
        end = self._end(reply)
        if not self._is_chat:
            return {"index": reply.index, "text": text, **end}
        # Only the first delta has the role: OpenAI's client concatenates what it gets.
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        delta["content"] = text or (None if calls else "")
        if calls:
            delta["tool_calls"] = [{"index": call.index, **_as_dict(call)} for call in calls]
        return {"index": reply.index, "delta": delta, **end}

    def _end(self, reply: Reply) -> dict[str, Any]:
        end = {"logprobs": self._logprobs(reply), "finish_reason": reply.finish_reason}
        return {**end, "token_ids": reply.take_token_ids()} if self._has_token_ids else end

    def _logprobs(self, reply: Reply) -> dict[str, Any] | None:
        """Those not yet sent. A token that shows no text yet has them in the next event, so tokens may run ahead."""
        if not self._has_logprobs:
            return None
        entries = reply.take_logprobs()
        if self._is_chat:
            content = [
                {**_named(text, value), "top_logprobs": [_named(*pair) for pair in top]}
                for text, value, top in entries
            ]
            return {"content": content, "refusal": None}
        start = self._num_characters[reply.index]
        ends = list(itertools.accumulate((len(text) for text, *_ in entries), initial=start))
        self._num_characters[reply.index] = ends.pop()
        return {
            "tokens": [text for text, *_ in entries],
            "token_logprobs": [value for _, value, _ in entries],
            "top_logprobs": [_likeliest([*top, (text, value)]) for text, value, top in entries],
            "text_offset": ends,
        }

    def _event(self, choices: list[dict[str, Any]], with_usage: bool, **more: Any) -> str:
        chunk: dict[str, Any] = {**self._base, "choices": choices, **more}
        if self._is_chat:
            chunk["object"] = "chat.completion.chunk"
        if self._include_usage or with_usage:
            replies = list(self._replies.values())
            chunk["usage"] = usage(replies, self._num_choices) if with_usage else None
        return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


def _as_dict(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _named(text: str, logprob: float) -> dict[str, Any]:
    """A token as chats have it. Part of a character has no text of its own, and so no bytes are known."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _likeliest(alternatives: list[tuple[str, float]]) -> dict[str, float]:
    """By text, as text completions have it; of tokens with one text, such as parts of a character, the first."""
    named: dict[str, float] = {}
    for text, logprob in alternatives:
        named.setdefault(text, logprob)
    return named


def error_body(error: ApiError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    return error.status, error.body


def error_events(error: ApiError) -> str:
    """The end of a stream that broke: an explicit error, so that no client takes the text for whole."""
    return f"data: {json.dumps(error.body)}\n\n"


def model_list(names: list[str]) -> dict[str, Any]:
    """The body of /v1/models."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "medusa_ray"} for name in names]
    return {"object": "list", "data": models}
