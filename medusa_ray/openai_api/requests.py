"""JSON bodies -> checked requests, or the error that the client is told.

Nothing is silently ignored: a field that would change the answer and is not supported is an error, unless it
holds the value at which it changes nothing.
"""

import dataclasses
import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from medusa_ray.chat import Message
from medusa_ray.medusa.sampling import MAX_LOGPROBS, Settings

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
        self.status, self.code = status, code
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def check_stop(stop: list[str]) -> list[str]:
    """The stop strings. Raises ValueError when one is empty or too long."""
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise ValueError(f"a stop string has {len(text)} characters; expected 1 to {MAX_STOP_CHARACTERS}")
    return stop


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

    length_field: ClassVar = "max_tokens"
    num_unasked: ClassVar = None  # tokens of a reply whose request asks for no number; None for all that fit

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
    stop: list[str] = []
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
        return check_stop(stop)

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
    input_field: ClassVar = "messages"
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
    input_field: ClassVar = "prompt"
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
        raise explain(error) from None
    _refuse_unsupported(request)
    if isinstance(request, ChatRequest):
        for i, message in enumerate(request.messages):
            _refuse_unsupported(message, f"messages.{i}.", harmless={"name"})
    if request.stream_options:
        _refuse_unsupported(request.stream_options, "stream_options.", harmless={"include_obfuscation"})
    return request


def explain(error: ValidationError) -> ApiError:
    """The first problem, as the client is told of it."""
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


def num_new_tokens(request: Any, num_prompt_tokens: int, max_input_tokens: int, max_total_tokens: int) -> int:
    """How long the reply to a request, of any protocol, may get. Raises ApiError 400, naming field, value and limit,
    when there is no room for it."""
    field = request.input_field
    if num_prompt_tokens == 0:
        raise ApiError(400, f"{field} is empty: it has no tokens, and at least one is needed.", field)
    if num_prompt_tokens > max_input_tokens:
        message = (
            f"{field} has {num_prompt_tokens} tokens, but at most {max_input_tokens} (max_input_tokens) are taken; "
            "shorten it."
        )
        raise ApiError(400, message, field, "context_length_exceeded")
    room = max_total_tokens - num_prompt_tokens
    wanted = request.num_wanted
    if wanted is None:
        return room if request.num_unasked is None else min(room, request.num_unasked)
    if wanted > room:
        message = (
            f"{field} has {num_prompt_tokens} tokens and {request.length_field} is {wanted}, together "
            f"{num_prompt_tokens + wanted}, but prompt and reply may have {max_total_tokens} (max_total_tokens); ask "
            f"for at most {room}."
        )
        raise ApiError(400, message, request.length_field, "context_length_exceeded")
    return wanted


def check_num_stop(stop: list[str], field: str, max_stop_sequences: int) -> None:
    """Raises ApiError 400 when there are too many."""
    if len(stop) > max_stop_sequences:
        message = f"{field} has {len(stop)} strings, but at most {max_stop_sequences} (max_stop_sequences) are taken."
        raise ApiError(400, message, field)
