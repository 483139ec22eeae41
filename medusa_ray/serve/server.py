"""Checked requests -> the replies of one engine. Knows neither HTTP nor Ray."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, cast

import torch

from medusa_ray import openai_api, tgi_api
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.scheduler import QueueFull
from medusa_ray.openai_api import ApiError, ChatRequest, CompletionRequest, Reply
from medusa_ray.serve.calls import Call, Totals
from medusa_ray.tgi_api import GenerateRequest
from medusa_ray.traffic import TrafficLog

RETRY_AFTER_S = 1
FRESH_S = 1.0  # a step is proof of life for so long
HEALTH_TIMEOUT_S = 20.0  # below Ray Serve's health_check_timeout_s

AnyRequest = ChatRequest | CompletionRequest | GenerateRequest
AnyEnvelope = openai_api.Envelope | tgi_api.Envelope
Piece = tuple[str, Reply]  # text that may be shown after a step, and the reply so far


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
        self.api_keys = _api_keys(args.api_key_env)
        self.replica = replica
        self.totals = Totals()
        self._probe: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, args: EngineConfig, replica: str = "") -> "Server":
        """A server that has answered itself a first time, so that no user waits for what is done once.

        Raises ValueError or OSError for what cannot be served.
        """
        _api_keys(args.api_key_env)
        # First, since a hook that cannot be imported is found in no time, and a base takes minutes to load.
        traffic = TrafficLog(args.traffic_log) if args.traffic_log else None
        if args.threads:
            torch.set_num_threads(args.threads)
        device = args.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = Engine.load(
            args.base,
            args.heads,
            tree=None if args.tree == "file" else args.tree,
            device=device,
            dtype=args.dtype,
            max_batch_size=args.max_batch_size,
            max_total_tokens=args.max_total_tokens,
            compile=args.compile,
            shares_prefixes=args.shares_prefixes,
            max_waiting=args.max_concurrent_requests - args.max_batch_size,
        )
        engine.warm_up()
        return cls(engine, Chat.load(args.base), args, traffic, replica)

    @property
    def max_input_tokens(self) -> int:
        most = self.engine.max_total_tokens - 1
        return most if self.args.max_input_tokens is None else min(self.args.max_input_tokens, most)

    async def answer(self, request: AnyRequest, call: Call) -> AsyncGenerator[Piece]:
        """The text of each step. Closing the generator cancels the request.

        Raises ApiError: before the first step for what cannot be served, later when the engine fails.
        """
        reply, last_s = None, None
        try:
            engine_request = self._admit(request)
            call.admitted_s, call.max_new_tokens = time.monotonic(), engine_request.max_new_tokens
            call.num_prompt_tokens = len(engine_request.prompt_ids)
            reply = Reply(
                self.chat.detokenizer(), request.stop, len(engine_request.prompt_ids), self.engine.num_nodes
            )
            stream = cast("AsyncGenerator[Delta]", self.engine.stream(engine_request))
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    last_s = self.totals.step(call, delta, last_s)
                    text = reply.push(delta)
                    if call.reply is not None:
                        call.reply += text
                    if reply.finish_reason:
                        self.totals.finished[reply.finish_reason] += 1
                        call.finish_reason = reply.finish_reason
                    yield text, reply
                    if reply.finish_reason:
                        return
        except QueueFull as error:
            raise ApiError(429, f"{error}; try again in {RETRY_AFTER_S} s.", code="queue_full") from None
        except RuntimeError as error:  # the engine has failed
            raise ApiError(503, str(error), code="engine_failed") from None
        finally:
            if reply is not None:
                call.num_tokens += reply.num_tokens
                call.num_steps += reply.num_steps

    def logged(
        self, pieces: AsyncGenerator[Piece], request: AnyRequest, envelope: AnyEnvelope
    ) -> AsyncGenerator[Piece]:
        """The same pieces; with the last of them the chat goes to the traffic log, if that takes it."""
        if self.traffic is None or not self.traffic.samples(envelope.id):
            return pieces
        if not isinstance(request, ChatRequest):
            self.traffic.drop("text_completion")
        elif (request.model_extra or {}).get("store") is False:
            self.traffic.drop("opted_out")
        else:
            return _logged(self.traffic, pieces, request, envelope)
        return pieces

    def close(self) -> None:
        """Writes what the traffic log still holds. Takes seconds when storage is slow."""
        if self.traffic:
            self.traffic.close()

    def _admit(self, request: AnyRequest) -> Request:
        """The request as the engine takes it. Raises ApiError when it cannot be served, QueueFull when not now."""
        if request.model is not None and request.model not in self.names:
            served = ", ".join(self.names)
            message = f"The model {request.model[:100]!r} does not exist here; served: {served}."
            raise ApiError(404, message, "model", "model_not_found")
        stop_field = "parameters.stop" if isinstance(request, GenerateRequest) else "stop"
        openai_api.check_num_stop(request.stop, stop_field, self.args.max_stop_sequences)
        self.engine.check_room()  # a refusal under overload is not to cost a tokenisation
        prompt_ids = self._prompt_ids(request)
        engine_request = Request(
            prompt_ids,
            openai_api.num_new_tokens(
                request, len(prompt_ids), self.max_input_tokens, self.engine.max_total_tokens
            ),
            ignore_eos=bool(request.ignore_eos),
            deadline_s=request.deadline_s,
            **request.settings,
        )
        try:
            self.engine.check(engine_request)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return engine_request

    def _prompt_ids(self, request: AnyRequest) -> list[int]:
        if isinstance(request, GenerateRequest):
            # The last ones, of which TGI's `truncate` counts so many.
            return self.chat.text_ids(request.inputs)[-(request.parameters.truncate or 0) :]
        if isinstance(request, CompletionRequest):
            return self.chat.text_ids(request.prompt) if isinstance(request.prompt, str) else request.prompt
        try:
            return self.chat.prompt_ids(request.chat)
        except ValueError as error:  # the base has no template, or its template refuses these messages
            raise ApiError(400, str(error), "messages") from None

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
            "max_stop_sequences": self.args.max_stop_sequences,
            "max_input_tokens": self.max_input_tokens,
            "max_total_tokens": engine.max_total_tokens,
            "router": "medusa_ray",
            "version": version("medusa_ray"),
            "docker_label": None,
            # ours
            "aliases": self.args.aliases,
            "base": self.args.base,
            "heads": self.args.heads,
            "num_heads": engine.num_heads,
            "head_layout": heads.layout if heads else None,
            "draft_vocab_size": heads.draft_vocab_size if heads else None,
            "tree_nodes": engine.num_nodes,
            "is_adaptive": engine.is_adaptive,
            "shares_prefixes": self.args.shares_prefixes,
            "mode": engine.mode,
            "threads": torch.get_num_threads(),
            "max_batch_size": self.args.max_batch_size,
            "payload_limit": self.args.payload_limit,
            "logged_share": self.traffic.config.share if self.traffic else 0.0,
        }


def _api_keys(variable: str | None) -> list[bytes]:
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
                texts.append(text)
                if reply.finish_reason:
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
