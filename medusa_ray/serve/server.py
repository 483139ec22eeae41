"""Checked requests -> the replies of one engine. Knows neither HTTP nor Ray."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, cast

import torch

from medusa_ray import openai_api, provenance, tgi_api
from medusa_ray.chat import Chat, Message
from medusa_ray.config import EngineConfig, TreeChoice
from medusa_ray.grammar import Grammar, GrammarError, Grammars, Matcher
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.heads import EXTENDED_WEIGHTS, WEIGHTS
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.scheduler import QueueFull
from medusa_ray.medusa.sharded import Shards
from medusa_ray.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Reply,
    TokenizeRequest,
)
from medusa_ray.serve.calls import Call, Totals
from medusa_ray.tgi_api import GenerateRequest
from medusa_ray.traffic import TrafficLog

log = logging.getLogger("medusa_ray")

RETRY_AFTER_S = 1
LONG_PROMPT_CHARACTERS = 20_000  # some 50 ms of a tokenizer's time
FRESH_S = 1.0  # a step is proof of life for so long
HEALTH_TIMEOUT_S = 20.0  # below Ray Serve's health_check_timeout_s

AnyRequest = ChatRequest | CompletionRequest | GenerateRequest
AnyEnvelope = openai_api.Envelope | tgi_api.Envelope
Piece = tuple[str, Reply]  # text that may be shown after a step, and the reply so far


@dataclass(frozen=True)
class Served:
    """What replies are guessed with."""

    heads: str | None
    tree: TreeChoice
    version: str  # of the heads: a digest of their weights

    @classmethod
    def of(cls, heads: str | None, tree: TreeChoice) -> "Served":
        files = [f"{heads}/{name}" for name in (WEIGHTS, EXTENDED_WEIGHTS)] if heads else []
        digests = {file: provenance.digest(file) for file in files}
        # What is no file stands for itself.
        return cls(heads, tree, next((digest[:12] for file, digest in digests.items() if digest != file), ""))


class Server:
    """Checked requests -> replies of one engine. Knows neither HTTP nor Ray."""

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        args: EngineConfig,
        traffic: TrafficLog | None = None,
        replica: str = "",
    ) -> None:
        """replica: its name in metrics, where there may be several. Raises ValueError when the variable of the API keys
        has none."""
        self.engine, self.chat, self.args, self.traffic = engine, chat, args, traffic
        self.names = [args.model_id, *args.aliases]
        self.grammars = Grammars(chat.tokenizer, engine.vocab_size, engine.eos_ids)
        self.api_keys = read_api_keys(args.api_key_env)
        self.replica = replica
        self.totals = Totals()
        self._probe: asyncio.Task[None] | None = None
        self.served = [Served.of(args.heads, args.tree)]  # the last one now
        self.refusal: str | None = None  # why the last ones asked for are not

    @classmethod
    def load(cls, args: EngineConfig, replica: str = "", shards: Shards | None = None) -> "Server":
        """A server that has answered itself a first time, so that no user waits for what is done once.

        shards: as Engine takes them. Raises ValueError or OSError for what cannot be served.
        """
        read_api_keys(args.api_key_env)
        # First, since a hook that cannot be imported is found in no time, and a base takes minutes to load.
        traffic = TrafficLog(args.traffic_log) if args.traffic_log else None
        if args.threads:
            torch.set_num_threads(args.threads)
        engine = Engine.load(
            args.base,
            args.heads,
            tree=_as_engine_takes(args.tree),
            device=device_of(args),
            dtype=args.dtype,
            max_batch_size=args.max_batch_size,
            max_total_tokens=args.max_total_tokens,
            compile=args.compile,
            shares_prefixes=args.shares_prefixes,
            max_waiting=args.max_concurrent_requests - args.max_batch_size,
            shards=shards,
        )
        engine.warm_up()
        return cls(engine, Chat.load(args.base), args, traffic, replica)

    @property
    def max_input_tokens(self) -> int:
        most = self.engine.max_total_tokens - 1
        return most if self.args.max_input_tokens is None else min(self.args.max_input_tokens, most)

    async def answer(self, request: AnyRequest, call: Call) -> AsyncGenerator[Piece]:
        """The text of each step of each choice. Closing the generator cancels the request.

        Raises ApiError: before the first step for what cannot be served, later when the engine fails.
        """
        try:
            admitted = await self._admit(request)
            call.admitted_s = time.monotonic()
            call.num_prompt_tokens = sum(len(group[0][0].prompt_ids) for group in admitted)
            call.max_new_tokens = max(group[0][0].max_new_tokens for group in admitted)
            groups = [[self._read(*one, call) for one in group] for group in admitted]
            call.num_open = sum(map(len, groups))
            is_single = len(groups) == 1 and len(groups[0]) == 1
            async with aclosing(groups[0][0] if is_single else _merged(groups)) as pieces:
                async for piece in pieces:
                    yield piece
        except QueueFull as error:
            raise ApiError(429, f"{error}; try again in {RETRY_AFTER_S} s.", code="queue_full") from None
        except RuntimeError as error:  # the engine has failed
            raise ApiError(503, str(error), code="engine_failed") from None

    async def _read(self, request: Request, reply: Reply, call: Call) -> AsyncGenerator[Piece]:
        """The text of each step of one choice."""
        stream = cast("AsyncGenerator[Delta]", self.engine.stream(request))
        last_s = None
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    last_s = self.totals.step(call, delta, last_s)
                    text = reply.push(delta)
                    self._check_grammar(request, delta)
                    if call.reply is not None:
                        call.reply += text
                    if reply.finish_reason:
                        self.totals.finished[reply.finish_reason] += 1
                        call.finish(reply.finish_reason)
                    yield text, reply
                    if reply.finish_reason:
                        return
        finally:
            call.num_tokens += reply.num_tokens
            call.num_steps += reply.num_steps

    def _check_grammar(self, request: Request, delta: Delta) -> None:
        """Raises ApiError where a reply has ended because its grammar went beyond llguidance's limits."""
        matcher = request.allowed_tokens
        if not isinstance(matcher, Matcher) or not matcher.failure or delta.finish_reason != "stop":
            return
        if not self.engine.eos_ids.intersection(delta.token_ids):
            message = f"The grammar could not be followed to the end of the reply: {matcher.failure}."
            raise ApiError(400, message, code="grammar_failed")

    def logged(
        self, pieces: AsyncGenerator[Piece], request: AnyRequest, envelope: AnyEnvelope
    ) -> AsyncGenerator[Piece]:
        """The same pieces; with the last of them the chat goes to the traffic log, if that takes it."""
        if self.traffic is None or not self.traffic.samples(envelope.id):
            return pieces
        if not isinstance(request, ChatRequest):
            self.traffic.drop("text_completion")
        elif request.tools or any(m.role == "tool" or m.tool_calls for m in request.messages):
            self.traffic.drop("tools")
        elif (request.model_extra or {}).get("store") is False:
            self.traffic.drop("opted_out")
        else:
            return _logged(self.traffic, pieces, request, envelope)
        return pieces

    def close(self) -> None:
        """Writes what the traffic log still holds. Takes seconds when storage is slow."""
        if self.traffic:
            self.traffic.close()

    async def _admit(self, request: AnyRequest) -> list[list[tuple[Request, Reply]]]:
        """The choices of each prompt as the engine takes them, and their replies to be.

        Raises ApiError when they cannot be served, QueueFull when not now.
        """
        if request.model is not None:
            self._check_model(request.model)
        stop_field = "parameters.stop" if isinstance(request, GenerateRequest) else "stop"
        openai_api.check_num_stop(request.stop, stop_field, self.args.max_stop_sequences)
        num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        if num_prompts > (limit := self.args.max_client_batch_size):
            message = (
                f"prompt has {num_prompts} prompts, but at most {limit} (max_client_batch_size) are taken."
            )
            raise ApiError(400, message, "prompt")
        num_replies = num_prompts * request.num_choices
        if num_replies > (limit := self.args.max_concurrent_requests):
            message = (
                f"n is {request.num_choices} for each of {num_prompts} prompts, together {num_replies} replies, but no "
                f"more than {limit} (max_concurrent_requests) run or wait here; ask for fewer at a time."
            )
            raise ApiError(400, message, "n")
        self.engine.check_room(num_replies)  # a refusal under overload is not to cost a tokenisation
        groups = []
        for prompt_ids in await self._tokenized(request):
            first = Request(
                prompt_ids,
                openai_api.num_new_tokens(
                    request, len(prompt_ids), self.max_input_tokens, self.engine.max_total_tokens
                ),
                ignore_eos=bool(request.ignore_eos),
                deadline_s=request.deadline_s,
                **request.settings,
            )
            try:
                self.engine.check(first)
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            groups.append([replace(first, seed=_seed(first.seed, i)) for i in range(request.num_choices)])
        if constraint := request.constraint:
            groups = [[await self._constrained(one, *constraint) for one in group] for group in groups]
        return [
            [(one, self._reply(request, one, i * len(group) + j)) for j, one in enumerate(group)]
            for i, group in enumerate(groups)
        ]

    async def _constrained(self, request: Request, field: str, grammar: Grammar) -> Request:
        try:
            return replace(request, allowed_tokens=await self.grammars.start(grammar))
        except GrammarError as error:
            raise ApiError(400, f"{field} cannot be followed: {error}.", field, "invalid_grammar") from None

    def _reply(self, request: AnyRequest, one: Request, index: int) -> Reply:
        echo, reader = "", None
        if isinstance(request, ChatRequest):
            reader = request.call_reader()
        elif isinstance(request, CompletionRequest) and request.echo:
            prompt = request.prompt[index // request.num_choices]
            echo = prompt if isinstance(prompt, str) else self.chat.text(prompt)
        num_nodes = self.engine.num_nodes
        return Reply(
            self.chat.detokenizer(), request.stop, len(one.prompt_ids), num_nodes, index, echo, reader
        )

    def _check_model(self, name: str) -> None:
        if name not in self.names:
            served = ", ".join(self.names)
            message = f"The model {name[:100]!r} does not exist here; served: {served}."
            raise ApiError(404, message, "model", "model_not_found")

    async def _tokenized(self, request: AnyRequest) -> list[list[int]]:
        """The prompts, while others' streams go on. Raises ApiError, at once for what is far too long."""
        most = self.chat.longest_token * self.engine.max_total_tokens
        is_cut = isinstance(request, GenerateRequest) and request.parameters.truncate
        num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        if request.num_characters > most * num_prompts and not is_cut:
            message = (
                f"{request.input_field} has {request.num_characters} characters, but at most "
                f"{self.engine.max_total_tokens} tokens (max_total_tokens) are taken, and no token has more than "
                f"{self.chat.longest_token} characters; shorten it."
            )
            raise ApiError(400, message, request.input_field, "context_length_exceeded")
        if request.num_characters > LONG_PROMPT_CHARACTERS:
            return await asyncio.to_thread(self._prompts, request)
        return self._prompts(request)

    def _prompts(self, request: AnyRequest) -> list[list[int]]:
        if isinstance(request, GenerateRequest):
            # The last ones, of which TGI's `truncate` counts so many.
            return [self.chat.text_ids(request.inputs)[-(request.parameters.truncate or 0) :]]
        if isinstance(request, CompletionRequest):
            return [self.chat.text_ids(p) if isinstance(p, str) else p for p in request.prompt]
        return [self._chat_ids(request.chat, request.offered)]

    def _chat_ids(
        self, messages: list[Message], tools: list[dict[str, Any]], is_prompt: bool = True
    ) -> list[int]:
        try:
            return self.chat.prompt_ids(messages, tools, is_prompt)
        except ValueError as error:  # the base has no template, or its template refuses these messages
            raise ApiError(400, str(error), "messages") from None

    async def swap(self, heads: str | None, tree: TreeChoice) -> None:
        """Serves with these heads and this tree from now on, and loses no request.

        Raises ValueError, OSError or RuntimeError when it cannot, and goes on with those it has.
        """
        self.refusal, now = None, self.served[-1]
        if (heads, tree) == (now.heads, now.tree):
            return
        self.engine.start()
        coming = await asyncio.to_thread(Served.of, heads, tree)
        await asyncio.to_thread(self.engine.swap, heads, _as_engine_takes(tree))
        self.served = [served for served in self.served if served != coming] + [coming]
        log.info("swapped heads=%s version=%s tree_nodes=%d", heads, coming.version, self.engine.num_nodes)

    def refuse(self, error: Exception) -> None:
        """Says why what was asked for is not served."""
        self.refusal = str(error)
        log.error("heads were not swapped, and heads=%s go on: %s", self.served[-1].heads, error)

    def tokenize(self, request: TokenizeRequest) -> Any:
        """Token ids of a prompt or chat as vLLM's /tokenize has them, of `inputs` as TGI's. Raises ApiError."""
        if request.model is not None:
            self._check_model(request.model)
        given = [name for name in ("prompt", "messages", "inputs") if getattr(request, name) is not None]
        if len(given) != 1:
            came = " and ".join(given) or "none of them"
            raise ApiError(400, f"{came} came; expected one of prompt, messages and inputs.", "prompt")
        with_special = request.add_special_tokens is not False
        if request.inputs is not None:
            return self.chat.token_spans(request.inputs, with_special)
        if request.prompt is not None:
            ids = self.chat.text_ids(request.prompt, with_special)
        else:
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
            messages = [message.as_template for message in request.messages or []]
            ids = self._chat_ids(messages, tools, request.add_generation_prompt is not False)
        return {"count": len(ids), "max_model_len": self.engine.max_total_tokens, "tokens": ids}

    def detokenize(self, request: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens, special ones as they are written. Raises ApiError."""
        if request.model is not None:
            self._check_model(request.model)
        for i, token in enumerate(request.tokens):
            if not 0 <= token < self.engine.vocab_size:
                message = f"tokens.{i} is {token}; expected 0 to {self.engine.vocab_size - 1}."
                raise ApiError(400, message, f"tokens.{i}")
        return {"prompt": str(self.chat.tokenizer.decode(request.tokens))}

    async def check_health(self) -> None:
        """Returns once a step has come to its end, of a request of its own where none has of late.

        Raises RuntimeError when none does in time, or the engine has failed; Ray Serve then replaces the replica.
        """
        since_s = time.monotonic() - FRESH_S
        deadline_s = time.monotonic() + HEALTH_TIMEOUT_S
        while self.engine.failure is None and self.engine.last_step_s < since_s:
            if time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"the engine has not come to the end of a step for {HEALTH_TIMEOUT_S:.0f} s"
                )
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._step_once())
            await asyncio.wait({self._probe}, timeout=0.05)
        if self.engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.engine.failure}")

    async def _step_once(self) -> None:
        """A request of one token for one token. Where there is no room for it, steps of others will do."""
        try:
            async for _ in self.engine.stream(Request([0], 1)):
                pass
        except QueueFull:
            await asyncio.sleep(0.05)
        except RuntimeError:
            pass  # the engine says so itself

    def info(self) -> dict[str, Any]:
        """What is served, and how: enough to label a benchmark of it."""
        engine, heads = self.engine, self.engine.heads
        sizer = engine.sizer if engine.is_adaptive else None
        parameter = next(engine.model.parameters())
        return {
            # TGI's, as far as they mean something here
            "model_id": self.args.model_id,
            "model_sha": None,  # what a hub name stands for is not pinned
            "model_dtype": str(parameter.dtype),
            "model_device_type": parameter.device.type,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": self.args.max_concurrent_requests,
            "max_best_of": 1,
            "max_client_batch_size": self.args.max_client_batch_size,
            "max_stop_sequences": self.args.max_stop_sequences,
            "max_input_tokens": self.max_input_tokens,
            "max_total_tokens": engine.max_total_tokens,
            "router": "medusa_ray",
            "version": version("medusa_ray"),
            "docker_label": None,
            # ours
            "aliases": self.args.aliases,
            "base": self.args.base,
            "heads": self.served[-1].heads,
            "heads_version": self.served[-1].version,
            "heads_refused": self.refusal,
            "num_heads": engine.num_heads,
            "head_layout": heads.layout if heads else None,
            "draft_vocab_size": heads.draft_vocab_size if heads else None,
            "tree_nodes": engine.num_nodes,
            "is_adaptive": engine.is_adaptive,
            "step_times": sizer.times if sizer else None,  # seconds by rows and nodes
            "shares_prefixes": self.args.shares_prefixes,
            "mode": engine.mode,
            "tensor_parallel": self.args.tensor_parallel,
            "threads": torch.get_num_threads(),
            "max_batch_size": self.args.max_batch_size,
            "payload_limit": self.args.payload_limit,
            "logged_share": self.traffic.config.share if self.traffic else 0.0,
        }


def device_of(args: EngineConfig) -> str:
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return args.device


def _as_engine_takes(tree: TreeChoice) -> list[list[int]] | str | None:
    return None if tree == "file" else tree


def read_api_keys(variable: str | None) -> list[bytes]:
    """Of the environment variable of this name. Raises ValueError when it holds none."""
    if variable is None:
        return []
    keys = [key.strip().encode() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ValueError(
            f"api_key_env names the environment variable {variable}, which is not set or holds no key. Set it to one "
            "key, or several with commas between, where the replica starts; or remove api_key_env to let everybody in."
        )
    return keys


async def _logged(
    traffic: TrafficLog, pieces: AsyncGenerator[Piece], request: ChatRequest, envelope: AnyEnvelope
) -> AsyncGenerator[Piece]:
    texts: list[str] = []
    is_whole = False
    try:
        async with aclosing(pieces):
            async for text, reply in pieces:
                if reply.index == 0:  # of several choices
                    texts.append(text)
                if reply.index == 0 and reply.finish_reason:
                    # Before it is sent: many a client hangs up on the last event, and nothing runs after that.
                    is_whole = True
                    messages = [*request.chat, {"role": "assistant", "content": "".join(texts)}]
                    traffic.add(
                        {
                            "id": envelope.id,
                            "messages": messages,
                            "model": request.model,
                            "created": envelope.created,
                            "finish_reason": reply.finish_reason,
                        }
                    )
                yield text, reply
    finally:
        if texts and not is_whole:
            traffic.drop("cut_off")


def _seed(seed: int | None, choice: int) -> int | None:
    """Of one of the choices of a prompt: the first is what it is alone, and the others differ, ever in the same way."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


async def _merged(groups: Sequence[Sequence[AsyncGenerator[Piece]]]) -> AsyncGenerator[Piece]:
    """The pieces of all sources as they come; raises what any of them raises. A group is the choices of one prompt:
    the others begin once the first has begun, and find the prompt in the cache.

    No source goes on before its piece is taken care of, since the reply in it is as its last step has left it.
    """
    queue: asyncio.Queue[tuple[Piece, asyncio.Event] | Exception | None] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def pump(source: AsyncGenerator[Piece], others: Sequence[AsyncGenerator[Piece]] = ()) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    if others:
                        tasks.extend([asyncio.create_task(pump(other)) for other in others])
                        others = ()
                        await asyncio.sleep(0)  # so that one for which there is no room says so first
                    done = asyncio.Event()
                    queue.put_nowait((piece, done))
                    await done.wait()
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    num_open = sum(map(len, groups))
    tasks += [asyncio.create_task(pump(first, others)) for first, *others in groups]
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                piece, done = item
                yield piece
                done.set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
