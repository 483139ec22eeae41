"""Checked requests -> the replies of one engine. Knows neither HTTP nor Ray."""

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import torch

from medusa_ray import openai_api
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.scheduler import QueueFull
from medusa_ray.openai_api import ApiError, ChatRequest, CompletionRequest, Envelope, Reply
from medusa_ray.traffic import TrafficLog

RETRY_AFTER_S = 1

Piece = tuple[str, Reply]  # text that may be shown after a step, and the reply so far


class Server:
    """Checked requests -> replies of one engine. Knows neither HTTP nor Ray."""

    def __init__(
        self, engine: Engine, chat: Chat, args: EngineConfig, traffic: TrafficLog | None = None
    ) -> None:
        self.engine, self.chat, self.args, self.traffic = engine, chat, args, traffic
        self.names = [args.model_id, *args.aliases]
        self.num_skipped_tokens = 0  # tokens that came with another one in the same step
        self.num_iterations = 0  # steps of a request, its prefill included
        self.finished: Counter[str] = Counter()  # by finish reason

    @classmethod
    def load(cls, args: EngineConfig) -> "Server":
        """Raises ValueError or OSError for what cannot be served."""
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
            max_waiting=args.max_queued_requests,
        )
        return cls(engine, Chat.load(args.base), args, traffic)

    async def answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Piece]:
        """The text of each step. Closing the generator cancels the request.

        Raises ApiError: before the first step for what cannot be served, later when the engine fails.
        """
        try:
            engine_request = self._admit(request)
            reply = Reply(
                self.chat.detokenizer(), request.stop, len(engine_request.prompt_ids), self.engine.num_nodes
            )
            stream = cast("AsyncGenerator[Delta]", self.engine.stream(engine_request))
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    self.num_iterations += 1
                    self.num_skipped_tokens += len(delta.token_ids) - 1
                    text = reply.push(delta)
                    if reply.finish_reason:
                        self.finished[reply.finish_reason] += 1
                    yield text, reply
                    if reply.finish_reason:
                        return
        except QueueFull as error:
            raise ApiError(429, f"{error}; try again in {RETRY_AFTER_S} s.", code="queue_full") from None
        except RuntimeError as error:  # the engine has failed
            raise ApiError(503, str(error), code="engine_failed") from None

    def logged(
        self, pieces: AsyncGenerator[Piece], request: ChatRequest | CompletionRequest, envelope: Envelope
    ) -> AsyncGenerator[Piece]:
        """The same pieces; with the last of them the chat goes to the traffic log, if that takes it."""
        if self.traffic is None or not self.traffic.samples(envelope.id):
            return pieces
        if isinstance(request, CompletionRequest):
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

    def _admit(self, request: ChatRequest | CompletionRequest) -> Request:
        """The request as the engine takes it. Raises ApiError when it cannot be served, QueueFull when not now."""
        if request.model not in self.names:
            served = ", ".join(self.names)
            message = f"The model {request.model[:100]!r} does not exist here; served: {served}."
            raise ApiError(404, message, "model", "model_not_found")
        self.engine.check_room()  # a refusal under overload is not to cost a tokenisation
        prompt_ids = self._prompt_ids(request)
        engine_request = Request(
            prompt_ids,
            openai_api.num_new_tokens(request, len(prompt_ids), self.engine.max_total_tokens),
            ignore_eos=bool(request.ignore_eos),
            deadline_s=request.deadline_s,
            **request.settings,
        )
        try:
            self.engine.check(engine_request)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return engine_request

    def _prompt_ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(request, CompletionRequest):
            return self.chat.text_ids(request.prompt) if isinstance(request.prompt, str) else request.prompt
        try:
            return self.chat.prompt_ids(request.chat)
        except ValueError as error:  # the base has no template, or its template refuses these messages
            raise ApiError(400, str(error), "messages") from None

    def check_health(self) -> None:
        """Raises RuntimeError once the engine has failed; Ray Serve then replaces the replica."""
        if self.engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.engine.failure}")

    def info(self) -> dict[str, Any]:
        """What is served, and how: enough to label a benchmark of it."""
        engine, heads = self.engine, self.engine.heads
        parameter = next(engine.model.parameters())
        return {
            "model_id": self.args.model_id,
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
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "threads": torch.get_num_threads(),
            "max_batch_size": self.args.max_batch_size,
            "max_queued_requests": self.args.max_queued_requests,
            "max_total_tokens": engine.max_total_tokens,
            "logged_share": self.traffic.config.share if self.traffic else 0.0,
        }


async def _logged(
    traffic: TrafficLog, pieces: AsyncGenerator[Piece], request: ChatRequest, envelope: Envelope
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
