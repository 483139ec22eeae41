"""The steps of a reply -> the text that may be shown after each, and what the reply cost."""

from typing import Any

from medusa_ray.chat import Detokenizer
from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.replies import Delta


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

    def take_entries(self) -> list[Logprob]:
        """Log-probability and alternatives of each token since the last call, when asked for."""
        taken, self._logprobs = self._logprobs, []
        return taken

    def take_logprobs(self) -> list[tuple[str, float, list[tuple[str, float]]]]:
        """Likewise, by text."""
        text = self._detokenizer.token_text
        entries = self.take_entries()
        return [(text(e.token_id), e.logprob, [(text(t), value) for t, value in e.top]) for e in entries]

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
