"""Sequences on their way -> what their callers see of them, and totals over all."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.scheduler import Sequence


@dataclass(frozen=True)
class Delta:
    """What one step added to one reply."""

    token_ids: list[int]
    finish_reason: str | None  # stop | length | deadline | cancelled
    num_steps: int  # so far, the prefill left out
    accepted_histogram: list[int]  # [j]: steps so far that committed j guesses
    num_guesses: int = 0  # so far
    logprobs: list[Logprob] | None = None  # of each token, when asked for
    queue_s: float = 0.0  # that the request waited

    @classmethod
    def of(cls, sequence: Sequence, taken: list[int], logprobs: list[Logprob] | None) -> "Delta":
        """logprobs: those of the sequence's row, there when any request of the batch wants some."""
        kept, num_top = None, sequence.request.logprobs
        if num_top is not None and logprobs is not None:
            kept = [replace(entry, top=entry.top[:num_top]) for entry in logprobs[: len(taken)]]
            sequence.logprobs += kept
        histogram = list(sequence.accepted_histogram)
        return cls(
            taken,
            sequence.finish_reason,
            sequence.num_steps,
            histogram,
            sequence.num_guesses,
            kept,
            sequence.queue_s,
        )


@dataclass(frozen=True)
class Completion:
    """A whole reply, its end-of-sequence token included when it ended so."""

    token_ids: list[int]
    finish_reason: str
    num_steps: int
    accepted_histogram: list[int]
    hidden_TC: Tensor | None  # the state that produced each token, when captured
    logprobs: list[Logprob] | None = None  # of each token, when asked for

    @classmethod
    def of(cls, sequence: Sequence) -> "Completion":
        hidden_TC = torch.cat(sequence.hidden_parts) if sequence.hidden_parts else None
        assert sequence.finish_reason is not None
        return cls(
            sequence.token_ids,
            sequence.finish_reason,
            sequence.num_steps,
            sequence.accepted_histogram,
            hidden_TC,
            None if sequence.request.logprobs is None else sequence.logprobs,
        )


@dataclass
class Counters:
    """Totals since the engine was loaded, under vLLM's names."""

    num_drafts: int = 0  # steps of a sequence that had guesses
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_generated_tokens: int = 0
    num_steps: int = 0  # steps of a sequence, guesses or not
    num_prompt_tokens: int = 0  # processed, shared ones not among them

    def count(self, num_guesses: int, num_taken: int) -> None:
        """Takes in a step of a sequence."""
        accepted = max(num_taken - 1, 0)  # none is taken where nothing was allowed to follow
        self.num_steps += 1
        self.num_generated_tokens += num_taken
        if num_guesses:
            self.num_drafts += 1
            self.num_draft_tokens += num_guesses
            self.num_accepted_tokens += accepted
            for position in range(accepted):
                self.num_accepted_tokens_per_pos[position] += 1
