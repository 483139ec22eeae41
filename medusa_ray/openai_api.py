"""OpenAI requests -> checked values, and an engine's steps -> OpenAI responses, stream events and errors.

Nothing is silently ignored: a field that would change the answer and is not supported is an error, unless it
holds the value at which it changes nothing. Each engine step is one stream event, all its tokens in it.
"""

import dataclasses
import itertools
import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from medusa_ray.chat import Detokenizer, Message
from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.sampling import MAX_LOGPROBS, Settings

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEED = 2**63 - 1
COMPLETION_TOKENS = 16  # OpenAI's own default of max_tokens for /v1/completions; chat has none
TEMPERATURE = 1.0  # likewise, for both

# Fields that say who asks or how to bill: they change no text.
HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that are not supported, with the values (besides null) at which they change no text.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


class ApiError(Exception):
    """What the client is told: an HTTP status and OpenAI's error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -------------------------------------------------------------------------------------------------- requests


class Incoming(BaseModel):
    """JSON as it comes: types are not bent, NaN is no number, and undeclared fields are left to `parse`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Incoming):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatMessage(Incoming):
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        """`[{"type": "text", "text": ...}, ...]` -> the text; other kinds of parts are refused."""
        if not isinstance(content, list):
            return content
        texts = [
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        ]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError('only parts of the form {"type": "text", "text": "..."} are supported')
        return "".join(map(str, texts))


class GenerationRequest(Incoming):
    """The fields that chat and text completions share. Null is a field left out."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)  # vLLM's extension: 0 and -1 keep every token
    min_p: float | None = Field(None, ge=0, le=1)  # vLLM's extension
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # vLLM's extension, after transformers
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Ours. Typical acceptance changes the distribution of the replies, and no seed brings them back; without
    # speculation a reply is the same. Past its deadline, counted from its coming, a reply ends with what it has.
    acceptance: Literal["exact", "typical"] | None = None
    speculates: bool | None = None
    deadline_s: float | None = Field(None, gt=0)
    n: Literal[1] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: list[str] = Field([], max_length=MAX_STOP_STRINGS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None  # vLLM's extension, which load generators send
    return_token_ids: bool | None = None  # vLLM's extension, for those who would tokenise the text again

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string_is_a_list(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _stop_strings_have_a_length(cls, stop: list[str]) -> list[str]:
        for text in stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"a stop string has {len(text)} characters; expected 1 to {MAX_STOP_CHARACTERS}"
                )
        return stop

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell of beside each token; None when no log-probabilities are wanted."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What the engine's Settings hold; a field left out has the engine's default, but for the temperature."""
        names = set(GenerationRequest.model_fields) & {field.name for field in dataclasses.fields(Settings)}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        given["top_k"] = max(given.get("top_k", 0), 0)
        return {"temperature": TEMPERATURE, "logprobs": self.num_logprobs, **given}


class ChatRequest(GenerationRequest):
    kind: ClassVar = "chat"
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def _alternatives_come_with_logprobs(cls, top_logprobs: int | None, info: ValidationInfo) -> int | None:
        if top_logprobs and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return top_logprobs

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chat(self) -> list[Message]:
        """The messages as templates know them; `developer` is OpenAI's newer word for `system`."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages]

    @property
    def num_wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    kind: ClassVar = "completion"
    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _only_one_prompt(cls, prompt: Any) -> Any:
        """A batch of one is that one; larger batches are refused."""
        if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
            return prompt
        if len(prompt) > 1:
            raise ValueError(f"{len(prompt)} prompts came, but one per request is supported")
        return prompt[0]

    @property
    def num_wanted(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS


AnyRequest = TypeVar("AnyRequest", bound=GenerationRequest)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """A checked request. Raises ApiError 400 that names the field, what came and what was expected."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    _refuse_unsupported(request)
    if isinstance(request, ChatRequest):
        for i, message in enumerate(request.messages):
            _refuse_unsupported(message, f"messages.{i}.", harmless={"name"})
    if request.stream_options:
        _refuse_unsupported(request.stream_options, "stream_options.", harmless={"include_obfuscation"})
    return request


def _explain(error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {problem['ctx']['error']}.")
    # The members of a union are part of pydantic's path, but not of the client's.
    path = ".".join(str(part) for part in problem["loc"] if part not in ("str", "list[int]"))
    if problem["type"] == "missing":
        return ApiError(400, f"{path} is missing.", path)
    came = repr(problem["input"])
    came = came if len(came) <= 100 else f"{came[:100]}..."
    return ApiError(400, f"{path or 'The body'} is {came}: {problem['msg']}.", path or None)


def _refuse_unsupported(model: Incoming, prefix: str = "", harmless: set[str] = HARMLESS) -> None:
    for name, value in (model.model_extra or {}).items():
        neutral = NEUTRAL.get(name, ()) if not prefix else ()
        # bool is an int in Python, but logprobs: 0 asks for log-probabilities and logprobs: false does not.
        same = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral)
        if value is None or name in harmless or same:
            continue
        advice = f" or set it to {json.dumps(neutral[0])}" if neutral else ""
        field = prefix + name
        message = f"{field} is not supported by this server; leave it out{advice}."
        raise ApiError(400, message, field, "unsupported")


def num_new_tokens(
    request: ChatRequest | CompletionRequest, num_prompt_tokens: int, max_total_tokens: int
) -> int:
    """How long the reply may get. Raises ApiError 400, naming both numbers, when the model cannot hold it."""
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    if num_prompt_tokens == 0:
        raise ApiError(400, f"{field} is empty: it has no tokens, and at least one is needed.", field)
    room = max_total_tokens - num_prompt_tokens
    wanted = request.num_wanted
    if room < 1:
        message = (
            f"{field} has {num_prompt_tokens} tokens, but this model holds {max_total_tokens} of prompt and "
            "reply together; shorten it."
        )
        raise ApiError(400, message, field, "context_length_exceeded")
    if wanted is not None and wanted > room:
        message = (
            f"{field} has {num_prompt_tokens} tokens and max_tokens is {wanted}, together "
            f"{num_prompt_tokens + wanted}, but this model holds {max_total_tokens}; ask for at most {room}."
        )
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return room if wanted is None else wanted


# -------------------------------------------------------------------------------------------------- replies


class Reply:
    """The steps of one reply -> the text that may be shown after each, and what the reply cost.

    Text that may begin a stop string is held back until that is known; nothing from a stop string on is ever
    shown. Tokens of a step that come after a stop string are neither shown nor counted.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: list[str], num_prompt_tokens: int, num_nodes: int
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self.num_steps = 0
        self.finish_reason: str | None = None
        self._histogram: list[int] = []
        self._num_nodes, self._num_guesses = num_nodes, 0
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""
        self._logprobs: list[Logprob] = []  # of the tokens that count, until they are taken
        self._token_ids: list[int] = []  # likewise

    def push(self, delta: Delta) -> str:
        """The text that this step allows to be shown, often less than it generated, at its end all."""
        self.num_steps, self._histogram = delta.num_steps, delta.accepted_histogram
        self._num_guesses = delta.num_guesses
        if not self._stop:
            self.num_tokens += len(delta.token_ids)
            self._token_ids += delta.token_ids
            self._logprobs += delta.logprobs or []
            self.finish_reason = delta.finish_reason
            text = self._detokenizer.push(delta.token_ids)
            return text + self._detokenizer.finish() if delta.finish_reason else text
        shown = ""
        for i, token in enumerate(
            delta.token_ids
        ):  # the one that completes a stop string is the last to count
            self.num_tokens += 1
            self._token_ids.append(token)
            self._logprobs += (delta.logprobs or [])[i : i + 1]
            shown += self._before_stop(self._detokenizer.push([token]))
            if self.finish_reason:
                return shown
        if delta.finish_reason:
            shown += self._before_stop(self._detokenizer.finish())
            if not self.finish_reason:
                shown += self._held
                self.finish_reason = delta.finish_reason
        return shown

    def _before_stop(self, new: str) -> str:
        """What may be shown of the held-back text and `new`; sets the finish reason at a stop string."""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            return text[: min(found)]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def take_logprobs(self) -> list[tuple[str, float, list[tuple[str, float]]]]:
        """Text, log-probability and alternatives of each token since the last call."""
        text = self._detokenizer.token_text
        taken, self._logprobs = self._logprobs, []
        return [(text(e.token_id), e.logprob, [(text(t), value) for t, value in e.top]) for e in taken]

    def take_token_ids(self) -> list[int]:
        """Each token since the last call."""
        taken, self._token_ids = self._token_ids, []
        return taken

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage: tokens, and how many guesses of the heads were right and wrong."""
        accepted = self._num_accepted()
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": self._num_guesses - accepted,
            },
        }

    def metrics(self) -> dict[str, Any]:
        """vLLM's figures of one request, which GuideLLM and AIPerf keep; a baseline accepts nothing."""
        accepted, drafted = self._num_accepted(), self._num_guesses
        return {
            "speculative_decoding": {
                "mean_acceptance_length": 1 + accepted / self.num_steps if self.num_steps else 1.0,
                "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
                "acceptance_histogram": self._histogram,
                "num_spec_steps": self.num_steps,
                "num_accepted_draft_tokens": accepted,
                "num_draft_tokens": drafted,
                "num_spec_tokens": self._num_nodes,
            }
        }

    def _num_accepted(self) -> int:
        return sum(count * num for count, num in enumerate(self._histogram))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


# -------------------------------------------------------------------------------------------------- responses


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


def error_events(error: ApiError) -> str:
    """The end of a stream that broke: an error, and no [DONE], so that no client takes the text for whole."""
    return f"data: {json.dumps(error.body)}\n\n"


def model_list(names: list[str]) -> dict[str, Any]:
    """The body of /v1/models."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "medusa_ray"} for name in names]
    return {"object": "list", "data": models}
