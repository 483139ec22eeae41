"""JSON bodies -> checked requests, or the error that the client is told.

Nothing is silently ignored: a field that would change the answer and is not supported is an error, unless it
holds the value at which it changes nothing.
"""

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema

from medusa_ray import grammar
from medusa_ray.chat import Message
from medusa_ray.grammar import Grammar, GrammarError
from medusa_ray.medusa.sampling import MAX_LOGPROBS, Settings
from medusa_ray.tools import CallReader

MAX_CHOICES = 8  # of one prompt
MAX_TOOLS = 128  # OpenAI's own limit
MAX_STOP_CHARACTERS = 256
MAX_SEED = 2**63 - 1
COMPLETION_TOKENS = 16  # OpenAI's own default of max_tokens for /v1/completions; chat has none
TEMPERATURE = 1.0  # likewise, for both
SHORTLY = reprlib.Repr()
SHORTLY.maxstring = SHORTLY.maxlong = SHORTLY.maxother = 98
UNION_MEMBER = re.compile(r"(str|NamedTool|(literal|list)\[.*\])$")


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


def _stop_at_first_error(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for inner in schema.values():
            _stop_at_first_error(inner)
    elif isinstance(schema, list | tuple):
        for inner in schema:
            _stop_at_first_error(inner)


class Incoming(BaseModel):
    """JSON as it comes: types are not bent, NaN is no number, and undeclared fields are left to `parse`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    harmless: ClassVar[set[str]] = set()  # undeclared fields that change no text, whatever they hold
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}  # others, with the values at which they change none

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lists are looked at up to their first wrong entry: errors of a million of them take seconds to make."""
        schema = handler(source)
        _stop_at_first_error(schema)
        return schema


class StreamOptions(Incoming):
    harmless = {"include_obfuscation"}
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CalledFunction(Incoming):
    name: str
    arguments: str


class ToolCall(Incoming):
    harmless = {"index"}
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Incoming):
    harmless = {"name"}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    content: str | None = Field(None, validate_default=True)

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any, info: ValidationInfo) -> Any:
        """`[{"type": "text", "text": ...}, ...]` -> the text; other kinds of parts are refused."""
        if content is None and not (info.data.get("role") == "assistant" and info.data.get("tool_calls")):
            raise ValueError("only an assistant's message with tool_calls has none")
        if not isinstance(content, list):
            return content
        texts = [
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        ]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError('only parts of the form {"type": "text", "text": "..."} are supported')
        return "".join(map(str, texts))

    @property
    def as_template(self) -> Message:
        """The message as chat templates know it; `developer` is OpenAI's newer word for `system`."""
        message: Message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            functions = [call.function for call in self.tool_calls]
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": f.name, "arguments": _parsed(f.arguments)},
                }
                for call, f in zip(self.tool_calls, functions, strict=True)
            ]
        return message


def _parsed(arguments: str) -> Any:
    """Templates write arguments out as JSON; those of a call that was cut are text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class JsonSchemaFormat(Incoming):
    harmless = {"name", "description", "strict"}  # strict or not, the reply is valid
    definition: Any = Field(alias="schema")


class ResponseFormat(Incoming):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Incoming):
    """vLLM's extension. One of these."""

    definition: Any = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class Function(Incoming):
    harmless = {"strict"}
    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Incoming):
    type: Literal["function"]
    function: Function


class FunctionName(Incoming):
    name: str


class NamedTool(Incoming):
    type: Literal["function"]
    function: FunctionName


class GenerationRequest(Incoming):
    """The fields that chat and text completions share. Null is a field left out."""

    length_field: ClassVar = "max_tokens"
    num_unasked: ClassVar = None  # tokens of a reply whose request asks for no number; None for all that fit

    harmless = {  # they say who asks or how to bill
        "metadata",
        "prompt_cache_key",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
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
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
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
    def num_choices(self) -> int:
        """Replies to each prompt."""
        return self.n or 1

    @property
    def constraint(self) -> tuple[str, Grammar] | None:
        """What the text of each reply must be, and the field that says so. Raises ApiError for what cannot be."""
        wanted: list[tuple[str, Callable[..., Grammar], Any]] = []
        if self.response_format and self.response_format.type == "json_object":
            wanted.append(("response_format", grammar.of_json_schema, {"type": "object"}))
        elif self.response_format and self.response_format.type == "json_schema":
            field = "response_format.json_schema"
            if self.response_format.json_schema is None:
                raise ApiError(400, f"{field} is missing.", field)
            wanted.append(
                (f"{field}.schema", grammar.of_json_schema, self.response_format.json_schema.definition)
            )
        if outputs := self.structured_outputs:
            wanted.append(("structured_outputs.json", grammar.of_json_schema, outputs.definition))
            wanted.append(("structured_outputs.regex", grammar.of_regex, outputs.regex))
            wanted.append(("structured_outputs.choice", grammar.of_choices, outputs.choice))
            if outputs.json_object:
                wanted.append(("structured_outputs.json_object", grammar.of_json_schema, {"type": "object"}))
        found = [(field, _grammar(field, make, what)) for field, make, what in wanted if what is not None]
        return self._one_constraint(found)

    def _one_constraint(self, found: list[tuple[str, Grammar]]) -> tuple[str, Grammar] | None:
        if len(found) > 1:
            (first, _), (second, _), *_ = found
            raise ApiError(
                400, f"{first} and {second} both say what the reply must be; leave one out.", second
            )
        if found and self.ignore_eos:
            field = found[0][0]
            raise ApiError(
                400, f"ignore_eos is true, but with {field} the end is where the text is whole.", "ignore_eos"
            )
        return found[0] if found else None

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
    neutral = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _alternatives_come_with_logprobs(cls, top_logprobs: int | None, info: ValidationInfo) -> int | None:
        if top_logprobs and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return top_logprobs

    @field_validator("tool_choice")
    @classmethod
    def _there_is_such_a_tool(cls, choice: Any, info: ValidationInfo) -> Any:
        names = [tool.function.name for tool in info.data.get("tools") or []]
        if choice == "required" and not names:
            raise ValueError("there are no tools")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(
                f"expected the name of one of the tools, {', '.join(names) or 'of which there are none'}"
            )
        return choice

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chat(self) -> list[Message]:
        """The messages as templates know them."""
        return [message.as_template for message in self.messages]

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model is told of; none where it may call none."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.model_dump(exclude_none=True) for tool in tools]

    @property
    def calls_are_forced(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def call_reader(self) -> CallReader | None:
        """Of one reply, when it may call functions."""
        offered = self.offered
        names = {tool["function"]["name"] for tool in offered}
        return CallReader(names, self.calls_are_forced) if offered else None

    def _one_constraint(self, found: list[tuple[str, Grammar]]) -> tuple[str, Grammar] | None:
        if found and self.offered:
            field = found[0][0]
            message = (
                f"{field} and tools both say what the reply may be; leave one out or set tool_choice to none."
            )
            raise ApiError(400, message, field)
        if self.calls_are_forced:
            functions = []
            for i, tool in enumerate(self.tools or []):
                is_named = isinstance(self.tool_choice, NamedTool)
                if not is_named or tool.function.name == self.tool_choice.function.name:  # type: ignore[union-attr]
                    schema = {"type": "object", **(tool.function.parameters or {})}
                    _grammar(f"tools.{i}.function.parameters", grammar.of_json_schema, schema)
                    functions.append((tool.function.name, schema))
            are_several = self.tool_choice == "required" and bool(self.parallel_tool_calls)
            found = [("tools", _grammar("tools", grammar.of_calls, functions, are_several))]
        return super()._one_constraint(found)

    @property
    def num_characters(self) -> int:
        """Of what is to be tokenised."""
        return sum(len(message.content or "") for message in self.messages)

    @property
    def num_wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    kind: ClassVar = "completion"
    input_field: ClassVar = "prompt"
    neutral = {"suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto")}
    prompt: list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt_is_a_list(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list)
        ):
            return [prompt]
        return prompt

    @field_validator("prompt")
    @classmethod
    def _there_is_a_prompt(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("0 prompts came; expected 1 at least")
        return prompt

    @field_validator("logprobs")
    @classmethod
    def _prompts_have_no_logprobs(cls, logprobs: int | None, info: ValidationInfo) -> int | None:
        if logprobs is not None and info.data.get("echo"):
            raise ValueError(
                "with echo it asks for those of the prompt, which are not known; leave one of them out"
            )
        return logprobs

    @field_validator("best_of")
    @classmethod
    def _best_of_are_all(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if best_of is not None and best_of != n:
            raise ValueError(f"expected n, which is {n}: all replies are returned")
        return best_of

    @property
    def num_characters(self) -> int:
        """Of what is to be tokenised: none where token ids came."""
        return sum(len(prompt) for prompt in self.prompt if isinstance(prompt, str))

    @property
    def num_wanted(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS


class TokenizeRequest(Incoming):
    """vLLM's `prompt` or `messages`, or TGI's `inputs`."""

    harmless = {"return_token_strs"}
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    inputs: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)


class DetokenizeRequest(Incoming):
    model: str | None = None
    tokens: list[int]


AnyRequest = TypeVar("AnyRequest", bound=Incoming)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """A checked request. Raises ApiError 400 that names the field, what came and what was expected."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None
    _refuse_unsupported(request)
    return request


def explain(error: ValidationError) -> ApiError:
    """The first problem, as the client is told of it."""
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {problem['ctx']['error']}.")
    # The members of a union are part of pydantic's path, but not of the client's.
    path = _short(".".join(str(part) for part in problem["loc"] if not UNION_MEMBER.match(str(part))))
    if problem["type"] == "missing":
        return ApiError(400, f"{path} is missing.", path)
    came = _short(SHORTLY.repr(problem["input"]))
    return ApiError(400, f"{path or 'The body'} is {came}: {problem['msg']}.", path or None)


def _short(text: str) -> str:
    """What a client sent, as far as an error repeats it."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def _refuse_unsupported(value: Any, path: str = "") -> None:
    """Raises ApiError for an undeclared field that may change the answer, however deep it is."""
    if isinstance(value, list):
        for i, inner in enumerate(value):
            if isinstance(inner, Incoming):
                _refuse_unsupported(inner, f"{path}{i}.")
    if not isinstance(value, Incoming):
        return
    for name, extra in (value.model_extra or {}).items():
        neutral = value.neutral.get(name, ())
        # bool is an int in Python, but logprobs: 0 asks for log-probabilities and logprobs: false does not.
        same = any(extra == v and isinstance(extra, bool) == isinstance(v, bool) for v in neutral)
        if extra is None or name in value.harmless or same:
            continue
        advice = f" or set it to {json.dumps(neutral[0])}" if neutral else ""
        field = _short(path + name)
        message = f"{field} is not supported by this server; leave it out{advice}."
        raise ApiError(400, message, field, "unsupported")
    for name in type(value).model_fields:
        _refuse_unsupported(getattr(value, name), f"{path}{name}.")


def _grammar(field: str, make: Callable[..., Grammar], *given: Any) -> Grammar:
    """A grammar of what a field gives. Raises ApiError that names it."""
    try:
        return make(*given)
    except GrammarError as error:
        raise ApiError(400, f"{field} cannot be followed: {error}.", field, "invalid_grammar") from None


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
