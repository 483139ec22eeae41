"""Texts of replies -> OpenAI's JSON bodies, stream events and errors. Each engine step is one event of its choice."""

import itertools
import json
import time
import uuid
from typing import Any

from medusa_ray.openai_api.replies import Reply
from medusa_ray.openai_api.requests import ApiError, ChatRequest, CompletionRequest, StreamOptions


class Envelope:
    """Texts of one reply -> the JSON bodies and stream events that carry them."""

    def __init__(self, request: ChatRequest | CompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        options = request.stream_options or StreamOptions()
        self._include_usage = bool(options.include_usage)
        self._continuous_usage = bool(options.continuous_usage_stats)
        self._is_first = True
        self._has_logprobs = request.num_logprobs is not None
        self._has_token_ids = bool(request.return_token_ids)
        self._num_characters = 0  # of the tokens whose logprobs were sent
        self.id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._base = {
            "id": self.id,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": self.created,
            "model": request.model,
        }

    def body(self, text: str, reply: Reply) -> dict[str, Any]:
        """The response to a request without streaming."""
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, **self._end(reply)}
        return {**self._base, "choices": [choice], "usage": reply.usage(), "metrics": reply.metrics()}

    def events(self, text: str, reply: Reply) -> str:
        """The stream events of one step: none when it shows nothing, the closing ones with the last."""
        ended = reply.finish_reason is not None
        if not text and not ended:
            return ""
        written = self._event([self._choice(text, reply)], reply, self._continuous_usage)
        if ended and self._include_usage:
            written += self._event([], reply, True, metrics=reply.metrics())
        return written + "data: [DONE]\n\n" if ended else written

    def _choice(self, text: str, reply: Reply) -> dict[str, Any]:
        end = self._end(reply)
        if not self._is_chat:
            return {"index": 0, "text": text, **end}
        # Only the first delta has the role: OpenAI's client concatenates what it gets.
        delta = {"role": "assistant", "content": text} if self._is_first else {"content": text}
        self._is_first = False
        return {"index": 0, "delta": delta, **end}

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
        ends = list(itertools.accumulate((len(text) for text, *_ in entries), initial=self._num_characters))
        self._num_characters = ends.pop()
        return {
            "tokens": [text for text, *_ in entries],
            "token_logprobs": [value for _, value, _ in entries],
            "top_logprobs": [_likeliest([*top, (text, value)]) for text, value, top in entries],
            "text_offset": ends,
        }

    def _event(self, choices: list[dict[str, Any]], reply: Reply, with_usage: bool, **more: Any) -> str:
        chunk: dict[str, Any] = {**self._base, "choices": choices, **more}
        if self._is_chat:
            chunk["object"] = "chat.completion.chunk"
        if self._include_usage or with_usage:
            chunk["usage"] = reply.usage() if with_usage else None
        return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


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
    return f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n"


def model_list(names: list[str]) -> dict[str, Any]:
    """The body of /v1/models."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "medusa_ray"} for name in names]
    return {"object": "list", "data": models}
