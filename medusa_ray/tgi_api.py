"""TGI's requests -> checked values, and an engine's steps -> TGI's responses, stream events and errors.

As its clients expect it, a stream has one event per token, also where a step commits several. A reply is greedy unless
a request asks for sampling. Fields that would change the reply and are not supported are refused, as in openai_api.
"""

import json
import random
import time
import uuid
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from medusa_ray import grammar
from medusa_ray.chat import Chat
from medusa_ray.grammar import Grammar, GrammarError
from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.sampling import MAX_LOGPROBS
from medusa_ray.openai_api import ApiError, Incoming, Reply, check_stop, explain

MAX_NEW_TOKENS = 100  # TGI's own default where there is room for so many
# Statuses of ApiError that TGI has another word for, and that word; what else a client can do wrong is validation.
ERRORS = {429: (429, "overloaded"), 500: (500, "incomplete_generation"), 503: (424, "generation")}


# -------------------------------------------------------------------------------------------------- requests


class GrammarParameter(Incoming):
    """What the text of a reply must be. value: a JSON schema, as such or as text, or a regular expression."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json", "json_schema", "regex"]
    value: Any

    def compiled(self) -> Grammar:
        """Raises GrammarError or ValueError."""
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise GrammarError(f"its value is {type(self.value).__name__}; expected a string")
            return grammar.of_regex(self.value)
        schema = json.loads(self.value) if isinstance(self.value, str) else self.value
        if self.type == "json_schema" and isinstance(schema, dict) and "schema" in schema:
            schema = schema["schema"]  # beside its name
        return grammar.of_json_schema(schema)


class GenerateParameters(Incoming):
    """Null is a field left out."""

    model_config = ConfigDict(extra="forbid")

    best_of: Literal[1] | None = None
    decoder_input_details: Literal[False] | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_new_tokens: int | None = Field(None, ge=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    return_full_text: bool | None = None
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: list[str] = Field([])
    temperature: float | None = Field(None, ge=0, le=100)  # 0, which TGI itself refuses, is greedy
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    top_n_tokens: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    top_p: float | None = Field(None, gt=0, le=1)
    truncate: int | None = Field(None, ge=1)
    typical_p: float | None = None
    watermark: Literal[False] | None = None
    adapter_id: None = None
    grammar: GrammarParameter | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _null_is_no_stop_sequence(cls, stop: Any) -> Any:
        return [] if stop is None else stop

    @field_validator("stop")
    @classmethod
    def _stop_sequences_have_a_length(cls, stop: list[str]) -> list[str]:
        return check_stop(stop)

    @field_validator("typical_p")
    @classmethod
    def _typical_sampling_is_off(cls, typical_p: float | None) -> float | None:
        if typical_p not in (None, 1.0):
            raise ValueError("typical sampling is not supported; leave it out or set it to 1.0")
        return typical_p


class GenerateRequest(Incoming):
    """A request to /generate, /generate_stream or /, with what the engine is to make of it."""

    model_config = ConfigDict(extra="forbid")
    input_field: ClassVar = "inputs"
    length_field: ClassVar = "parameters.max_new_tokens"
    num_unasked: ClassVar = MAX_NEW_TOKENS
    num_choices: ClassVar = 1
    model: ClassVar = None  # whatever is served
    ignore_eos: ClassVar = False
    deadline_s: ClassVar = None

    inputs: str
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)
    stream: bool | None = None
    options: dict[str, Any] | None = (
        None  # of Hugging Face's hosted API, whose clients send it; it changes no text
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _null_is_no_parameters(cls, parameters: Any) -> Any:
        return {} if parameters is None else parameters

    @property
    def stop(self) -> list[str]:
        return self.parameters.stop

    @property
    def num_characters(self) -> int:
        """Of what is to be tokenised."""
        return len(self.inputs)

    @property
    def num_wanted(self) -> int | None:
        return self.parameters.max_new_tokens

    @property
    def constraint(self) -> tuple[str, Grammar] | None:
        """What the text of the reply must be, and the field that says so. Raises ApiError for what cannot be."""
        field, wanted = "parameters.grammar", self.parameters.grammar
        try:
            return (field, wanted.compiled()) if wanted else None
        except (ValueError, RecursionError) as error:  # GrammarError among them
            raise ApiError(400, f"{field} cannot be followed: {error}.", field, "invalid_grammar") from None

    @property
    def tells_tokens(self) -> bool:
        return bool(self.stream or self.parameters.details)

    @cached_property
    def seed(self) -> int | None:
        """What a sampled reply draws with, drawn itself where none was given; None for a greedy reply."""
        wanted = self.parameters
        if (
            not any((wanted.do_sample, wanted.temperature, wanted.top_k, wanted.top_p))
            or wanted.temperature == 0
        ):
            return None
        return random.getrandbits(62) if wanted.seed is None else wanted.seed

    @property
    def settings(self) -> dict[str, Any]:
        """What the engine's Settings hold."""
        names = ("frequency_penalty", "repetition_penalty", "top_k", "top_p")
        given = {name: value for name in names if (value := getattr(self.parameters, name)) is not None}
        if self.tells_tokens:
            given["logprobs"] = self.parameters.top_n_tokens or 0
        if self.seed is None:
            return given
        signed = self.seed if self.seed < 2**63 else self.seed - 2**64  # the engine's seeds have a sign
        return {"temperature": self.parameters.temperature or 1.0, "seed": signed, **given}


def parse(body: bytes, stream: bool | None = None) -> GenerateRequest:
    """A checked request; stream: as the route says it, or None where the request may. Raises ApiError 400."""
    try:
        request = GenerateRequest.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None
    return request if stream is None else request.model_copy(update={"stream": stream})


# -------------------------------------------------------------------------------------------------- responses


class Envelope:
    """Tokens of one reply -> the JSON bodies and stream events that carry them.

    The text of a reply that a stop sequence ends has that at its end, as TGI's does.
    """

    def __init__(self, request: GenerateRequest, chat: Chat) -> None:
        self.id, self.created = uuid.uuid4().hex, int(time.time())
        self._request, self._chat = request, chat
        self._detokenizer = chat.detokenizer()
        self._decoded = ""  # of all tokens that count
        self._shown = ""  # of that, what comes before a stop sequence
        self._num_events = 0
        self._last_id: int | None = None
        self._reply: Reply | None = None
        self._tokens: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []

    def add(self, text: str, reply: Reply) -> None:
        """Takes in a step, for `body`."""
        self._shown += text
        self._reply = reply
        self._tokens += self._take(reply)

    def body(self) -> dict[str, Any]:
        """The response to a request without streaming, once the reply is whole."""
        assert self._reply is not None
        body: dict[str, Any] = {"generated_text": self._generated(self._reply)}
        if self._request.parameters.details:
            tops = [top for _, top in self._tokens]
            body["details"] = {
                **self._details(self._reply),
                "prefill": [],
                "tokens": [token for token, _ in self._tokens],
                **({"top_tokens": tops} if any(tops) else {}),
            }
        return body

    def events(self, text: str, reply: Reply) -> str:
        """The stream events of one step, one for each token; the last of a reply has its whole text."""
        self._shown += text
        tokens = self._take(reply)
        if reply.finish_reason and not tokens:  # where a grammar lets nothing follow
            tokens = [(self._token(min(self._chat.eos_ids, default=0), "", 0.0), [])]
        written = ""
        for left, (token, top) in zip(range(len(tokens), 0, -1), tokens, strict=True):
            self._num_events += 1
            event = {"index": self._num_events, "token": token, "generated_text": None, "details": None}
            if top:
                event["top_tokens"] = top
            if reply.finish_reason and left == 1:
                event["generated_text"] = self._generated(reply)
                if self._request.parameters.details:
                    event["details"] = {**self._details(reply), "input_length": reply.num_prompt_tokens}
            written += _event(event)
        return written

    def _take(self, reply: Reply) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Each token since the last call, and the likeliest ones at its place. A character's bytes stand with the
        token that has the last of them."""
        ids, entries = reply.take_token_ids(), reply.take_entries()
        if not self._request.tells_tokens:
            entries = [Logprob(token_id, 0.0, []) for token_id in ids]
        taken = []
        for at, (token_id, entry) in enumerate(zip(ids, entries, strict=True), start=1):
            text = self._detokenizer.push([token_id])
            if reply.finish_reason and at == len(ids):
                text += self._detokenizer.finish()
            self._decoded += text
            top = [self._token(i, self._detokenizer.token_text(i), value) for i, value in entry.top]
            taken.append((self._token(token_id, text, entry.logprob), top))
            self._last_id = token_id
        return taken

    def _token(self, token_id: int, text: str, logprob: float) -> dict[str, Any]:
        special = token_id in self._chat.special_ids
        text = self._detokenizer.token_text(token_id) if special else text
        return {"id": token_id, "text": text, "logprob": logprob, "special": special}

    def _generated(self, reply: Reply) -> str:
        text = self._shown
        if self._finish_reason(reply) == "stop_sequence":
            ends = (text + stop for stop in self._request.stop if self._decoded.startswith(text + stop))
            text = next(ends, text)
        return self._request.inputs + text if self._request.parameters.return_full_text else text

    def _details(self, reply: Reply) -> dict[str, Any]:
        return {
            "finish_reason": self._finish_reason(reply),
            "generated_tokens": reply.num_tokens,
            "seed": self._request.seed,
        }

    def _finish_reason(self, reply: Reply) -> str | None:
        if reply.finish_reason != "stop":
            return reply.finish_reason
        is_stopped = self._request.stop and self._last_id not in self._chat.eos_ids
        return "stop_sequence" if is_stopped else "eos_token"


def error_body(error: ApiError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error, as TGI has them."""
    status, kind = ERRORS.get(
        error.status, (422 if error.status in (400, 404) else error.status, "validation")
    )
    return status, {"error": str(error), "error_type": kind}


def error_events(error: ApiError) -> str:
    """The end of a stream that broke."""
    return _event(error_body(error)[1])


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
