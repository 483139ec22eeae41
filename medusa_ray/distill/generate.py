"""A shard of prompts -> the base's replies, and the hidden states that produced them.

An actor works at several shards at a time, whose prompts run in one continuous batch: the last rows of a shard are
joined by the first of the next, and the batch stays full.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch

from medusa_ray import parts, shards
from medusa_ray.config import DistillConfig, RunConfig, UserError
from medusa_ray.distill import rows
from medusa_ray.distill.attempts import Attempts
from medusa_ray.distill.rows import Facts, Row, reply, seed_of
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Completion

LoadEngine = Callable[..., Any]


def shards_at_a_time(settings: DistillConfig, rows_per_part: int) -> int:
    """So many that a full batch of other rows waits while the last rows of a shard run."""
    return 1 + math.ceil(2 * settings.batch_size / rows_per_part)


class SharedEngine:
    """One engine for the threads of a process, whose requests run in one continuous batch."""

    def __init__(self, engine: Any, batch_size: int) -> None:
        self.engine, self.batch_size = engine, batch_size
        self._turn, self._next = threading.Lock(), threading.Lock()
        self._door, self._left = threading.Lock(), threading.Condition()
        self._num_inside = 0
        # Slots of the batch in all steps so far, those that held a sequence, and both as they were when somebody last
        # waited: what came after is the end of the work, where no batch can be full.
        self._slots, self._taken, self._steady = 0, 0, (0, 0)
        self._told = (time.perf_counter(), 0, 0, (0, 0))

    @contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        """For as long as a shard is generated. alone: no other shard is meanwhile."""
        with self._door:
            if alone:
                with self._left:
                    self._left.wait_for(lambda: not self._num_inside)
                yield
                return
            with self._left:
                self._num_inside += 1
        try:
            yield
        finally:
            with self._left:
                self._num_inside -= 1
                self._left.notify_all()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Continues every prompt, in the batch that other threads' requests run in too."""
        sequences = [self.engine.add(request) for request in requests]
        while True:
            with self.turn():  # whoever waits for sequences steps for all
                if all(sequence.finish_reason for sequence in sequences):
                    return [Completion.of(sequence) for sequence in sequences]
                self._step()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While no other thread asks anything of the engine, its model included. They take turns, for a lock may go to
        the same one for ever."""
        with self._next:
            self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()

    def _step(self) -> None:
        before = self.engine.counters.num_steps
        self.engine.step()
        if num_rows := self.engine.counters.num_steps - before:
            self._slots += self.batch_size
            self._taken += num_rows
        if self.engine.num_waiting:
            self._steady = self._slots, self._taken

    def cost(self) -> Facts:
        """What was spent since the last call."""
        with self._turn:
            told, now = self._told, (time.perf_counter(), self._slots, self._taken, self._steady)
            self._told = now
        return {
            "actor_seconds": now[0] - told[0],
            "slots": {"all": now[1] - told[1], "steady": now[3][0] - told[3][0]},
            "taken": {"all": now[2] - told[2], "steady": now[3][1] - told[3][1]},
        }


class Generator:
    """Generates a shard's replies into its part of distilled/, and of hidden/ where states are captured."""

    def __init__(
        self,
        config: RunConfig,
        base: str,
        device: str,
        longest_prompt_tokens: int,
        prompts: str,
        distilled: str,
        hidden: str | None,
        load_engine: LoadEngine | None,
        run: str = "",
    ) -> None:
        """run: tells this driver's workers from those of an earlier one."""
        load_engine = load_engine or Engine.load
        if device == "cpu":
            torch.set_num_threads(1)  # an actor has one CPU
        self.settings, self.run = config.distill, run
        self.dtype, self.loss_on, self.top_k = config.model.dtype, config.data.loss_on, config.hidden.top_k
        self.prompts, self.distilled, self.hidden = rows.Prompts(prompts), distilled, hidden
        try:
            self.engine = load_engine(
                base,
                device=device,
                dtype=config.model.dtype,
                max_batch_size=self.settings.batch_size,
                max_total_tokens=longest_prompt_tokens + self.settings.max_new_tokens,
                revision=config.model.revision,
                quantization=config.model.quantization,
            )
        except (OSError, ValueError) as error:
            message = f"the base {base} cannot be loaded: {error}. Set model.base to a model that can."
            raise UserError(message) from error
        self.shared = SharedEngine(self.engine, self.settings.batch_size)

    def __call__(self, shard: shards.Shard) -> Facts:
        asked = [(prompt, n) for prompt in self.prompts.of(shard) for n in range(self.settings.samples)]
        attempts = Attempts(self.distilled, shard["part"], self.run, shards.node(), shards.nodes)
        outcomes = self._generate(asked, attempts)
        replies: list[Row] = []
        captured = []
        for (prompt, sample), outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, str):
                replies.append(reply(prompt, error=outcome, sample=sample))
                continue
            replies.append(reply(prompt, outcome.token_ids, outcome.finish_reason, sample=sample))
            captured.append((replies[-1], outcome.hidden_TC))
        if self.hidden:
            with self.shared.turn():  # a teacher's pass is one of the same model, and sets it up otherwise
                states = self._hidden_table(captured)
            parts.write(self.hidden, shard["part"], states)
        sources = rows.sources_of([prompt for prompt, _ in asked])
        cost = {**self.shared.cost(), "retries": attempts.num_earlier}
        facts = rows.write(self.distilled, shard["part"], replies, sources, **cost)
        attempts.end()
        return facts

    def _generate(self, asked: list[tuple[Row, int]], attempts: Attempts) -> list[Any]:
        """A completion for each prompt and sample, or the reason why there is none."""
        requests = [self._request(*one) for one in asked]
        outcomes = [
            prompt["error"] or self._fault(request)
            for (prompt, _), request in zip(asked, requests, strict=True)
        ]
        for row, times in attempts.fatal.items():
            outcomes[row] = f"killed its worker {times} times: it generated nothing else"
        good = [row for row, outcome in enumerate(outcomes) if outcome is None]
        with self.shared.entered(alone=attempts.is_careful):
            for group in attempts.groups(good, self.settings.batch_size):
                for row, completion in zip(
                    group, self.shared.generate([requests[row] for row in group]), strict=True
                ):
                    outcomes[row] = completion
        return outcomes

    def _request(self, prompt: Row, sample: int) -> Request:
        return Request(
            prompt["prompt_ids"],
            self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=seed_of(self.settings.seed, prompt["id"], sample),
            capture_hidden=self.hidden is not None,
        )

    def _fault(self, request: Request) -> str | None:
        try:
            self.engine.check(request)
        except ValueError as error:
            return f"refused by the engine: {error}"
        return None

    def _hidden_table(self, captured: list[tuple[Row, Any]]) -> pa.Table:
        """captured: each good row, and the state that produced each token of its reply."""
        from medusa_ray.medusa.states import teacher
        from medusa_ray.states import leaves_labels, table_of

        kept = [(row, hidden_TC) for row, hidden_TC in captured if leaves_labels(row, self.loss_on)]
        return table_of(
            [row for row, _ in kept],
            [hidden_TC for _, hidden_TC in kept],
            self.dtype,
            self.engine.hidden_size,
            self.loss_on,
            self.top_k,
            lambda hidden_NC, k: teacher(self.engine.model, hidden_NC, k),
        )
