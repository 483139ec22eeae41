"""The steps of a reply -> the text that may be shown after each, and what the reply cost."""

import itertools
from collections.abc import Sequence
from typing import Any

from medusa_ray.chat import Detokenizer
from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.replies import Delta
from medusa_ray.tools import Call, CallReader


class Reply:
    """The steps of one reply -> the text that may be shown after each, and what the reply cost.

    Text that may begin a stop string is held back until that is known; nothing from a stop string on is ever
    shown. Tokens of a step that come after a stop string are neither shown nor counted.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: list[str],
        num_prompt_tokens: int,
        num_nodes: int,
        index: int = 0,
        echo: str = "",
        reader: CallReader | None = None,
    ) -> None:
        """index: among the choices of the response. echo: text to show before the reply's own. reader: where the model
        may call functions."""
        self.num_prompt_tokens, self.index = num_prompt_tokens, index
        self._echo, self._reader = echo, reader
        self._num_calls_taken = 0
        self.num_tokens = 0
        self.num_steps = 0
        self.finish_reason: str | None = None
        self.accepted_histogram: list[int] = []
        self.num_nodes, self.num_guesses = num_nodes, 0
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""
        self._logprobs: list[Logprob] = []  # of the tokens that count, until they are taken
        self._token_ids: list[int] = []  # likewise

    def push(self, delta: Delta) -> str:
        """The text that this step allows to be shown, often less than it generated, at its end all."""
        echo, self._echo = self._echo, ""
        text = echo + self._push(delta)
        if self._reader is None:
            return text
        text = self._reader.push(text)
        if self.finish_reason:
            text += self._reader.finish()
            if self._reader.calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return text

    def _push(self, delta: Delta) -> str:
        self.num_steps, self.accepted_histogram = delta.num_steps, delta.accepted_histogram
        self.num_guesses = delta.num_guesses
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

    def take_calls(self) -> list[Call]:
        """Each call since the last call of this."""
        calls = self._reader.calls[self._num_calls_taken :] if self._reader else []
        self._num_calls_taken += len(calls)
        return calls

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

    @property
    def num_accepted(self) -> int:
        """Guesses of the heads that were right."""
        return sum(count * num for count, num in enumerate(self.accepted_histogram))


def usage(replies: Sequence[Reply], num_choices: int = 1) -> dict[str, Any]:
    """OpenAI's usage of all choices: tokens, and how many guesses of the heads were right and wrong.

    num_choices: of each prompt, whose tokens count once.
    """
    num_prompt = sum(reply.num_prompt_tokens for reply in replies if reply.index % num_choices == 0)
    num_reply = sum(reply.num_tokens for reply in replies)
    accepted = sum(reply.num_accepted for reply in replies)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_reply,
        "total_tokens": num_prompt + num_reply,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(reply.num_guesses for reply in replies) - accepted,
        },
    }


def metrics(replies: Sequence[Reply]) -> dict[str, Any]:
    """vLLM's figures of one request, which GuideLLM and AIPerf keep; a baseline accepts nothing."""
    accepted = sum(reply.num_accepted for reply in replies)
    drafted = sum(reply.num_guesses for reply in replies)
    num_steps = sum(reply.num_steps for reply in replies)
    histograms = itertools.zip_longest(*(reply.accepted_histogram for reply in replies), fillvalue=0)
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + accepted / num_steps if num_steps else 1.0,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": [sum(counts) for counts in histograms],
            "num_spec_steps": num_steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": replies[0].num_nodes,
        }
    }


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
