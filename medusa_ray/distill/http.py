"""A shard of prompts -> the replies of an OpenAI server that is already running, for distill.engine: http.

Prompts go out as token ids, and replies come back as such where the server has return_token_ids, as vLLM and
medusa_ray do. Elsewhere their text is tokenised again, which may cut it otherwise than the model did: they are counted.
"""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from medusa_ray import shards
from medusa_ray.chat import Chat
from medusa_ray.config import DistillConfig, RunConfig, ServerConfig, UserError
from medusa_ray.distill import rows
from medusa_ray.distill.rows import Facts, Row, reply, seed_of

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
AGAIN = {408, 409, 425, 429}  # and 5xx
# The server refuses us, or what every request says: no other row would fare better.
OURS = {401, 403, 404, 405}


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    finish_reason: str
    is_retokenised: bool


class RowError(Exception):
    """Why there is no reply to one prompt."""


class Client:
    """The server, for several threads."""

    def __init__(
        self, server: ServerConfig, settings: DistillConfig, base: str, revision: str | None
    ) -> None:
        """base: whose tokenizer stands in where the server sends no token ids. Raises UserError without the key."""
        self.server, self.settings = server, settings
        self.url = f"{server.url.rstrip('/')}/v1/completions"
        self.headers = {"Content-Type": "application/json"}
        if server.api_key_env:
            if not (key := os.environ.get(server.api_key_env)):
                raise UserError(
                    f"distill.server.api_key_env is {server.api_key_env!r}, but no such variable is set where the "
                    "actors of Ray run. Set it before Ray starts there."
                )
            self.headers["Authorization"] = f"Bearer {key}"
        self.base, self.revision = base, revision
        self.num_retries = 0
        self._chat: Chat | None = None
        self._lock = threading.Lock()
        self._answered_s = float("-inf")
        self._asks_for_ids = True

    def ask(self, prompt_ids: list[int], seed: int) -> Answer:
        """Raises RowError for what this prompt is to blame for, UserError when nothing is answered any more."""
        began_s, wait_s = time.monotonic(), FIRST_WAIT_S
        tries_left = self.server.retries
        while True:
            asks_for_ids = self._asks_for_ids
            try:
                answer = self._answer(self._post(prompt_ids, seed, asks_for_ids))
                self._answered_s = time.monotonic()
                return answer
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")
                fault = f"{error.code} {said[:300]}"
                if error.code in OURS:
                    raise UserError(
                        f"{self.url} says {fault}. Set distill.server's url, model and api_key_env to what it serves."
                    ) from None
                if error.code < 500 and error.code not in AGAIN:
                    self._answered_s = time.monotonic()  # it is there, and understands others
                    if asks_for_ids and "return_token_ids" in said:
                        self._asks_for_ids = False
                        continue
                    raise RowError(f"refused by the server: {fault}") from None
                asked_s = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError) as error:
                # No connection, one cut short, a timeout, or a body that is none.
                fault, asked_s = f"{type(error).__name__}: {error}", None
            if not tries_left:
                break
            tries_left -= 1
            with self._lock:
                self.num_retries += 1
            # Not all at once again.
            time.sleep(asked_s if asked_s is not None else wait_s * random.uniform(0.5, 1))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        if self._answered_s >= began_s:
            raise RowError(f"no answer from the server: {fault}, {self.server.retries + 1} times")
        raise UserError(
            f"{self.url} has answered nobody for {time.monotonic() - began_s:.0f} s: {fault}. Once it runs, the same "
            "command goes on."
        )

    def _post(self, prompt_ids: list[int], seed: int, asks_for_ids: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt": prompt_ids,
            "max_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": seed,
        }
        if asks_for_ids:
            body["return_token_ids"] = True
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        with urllib.request.urlopen(request, timeout=self.server.timeout_s) as response:
            return dict(json.load(response))

    def _answer(self, body: dict[str, Any]) -> Answer:
        choice = body["choices"][0]
        finish_reason = choice["finish_reason"]
        if finish_reason not in ("stop", "length"):
            raise RowError(f"cut short by the server: finish_reason is {finish_reason!r}")
        if (token_ids := choice.get("token_ids")) is not None:
            return Answer(token_ids, finish_reason, False)
        return Answer(self._retokenise(choice["text"], finish_reason), finish_reason, True)

    def _retokenise(self, text: str, finish_reason: str) -> list[int]:
        with self._lock:
            if self._chat is None:
                self._chat = Chat.load(self.base, self.revision)
            return self._chat.continuation_ids(text, is_whole=finish_reason == "stop")


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After that is a number; dates are rare, and waiting as usual serves for them."""
    try:
        return min(max(float(retry_after or ""), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return None


class Asker:
    """Asks for a shard's replies and writes them into its part of distilled/."""

    def __init__(self, config: RunConfig, base: str, prompts: str, distilled: str) -> None:
        assert config.distill.server is not None
        self.settings, self.server = config.distill, config.distill.server
        self.prompts, self.distilled = rows.Prompts(prompts), distilled
        self.client = Client(self.server, self.settings, base, config.model.revision)
        self.pool = ThreadPoolExecutor(self.server.concurrency)  # of all shards that are at work here
        self._lock = threading.Lock()
        self._told = (time.perf_counter(), 0)

    def __call__(self, shard: shards.Shard) -> Facts:
        asked = [(prompt, n) for prompt in self.prompts.of(shard) for n in range(self.settings.samples)]
        answers = list(self.pool.map(self._ask, asked))
        replies = [
            reply(prompt, error=answer, sample=sample)
            if isinstance(answer, str)
            else reply(prompt, answer.token_ids, answer.finish_reason, sample=sample)
            for (prompt, sample), answer in zip(asked, answers, strict=True)
        ]
        num_retokenised = sum(isinstance(answer, Answer) and answer.is_retokenised for answer in answers)
        sources = rows.sources_of([prompt for prompt, _ in asked])
        cost = {**self._cost(), "retokenised": num_retokenised}
        return rows.write(self.distilled, shard["part"], replies, sources, **cost)

    def _ask(self, one: tuple[Row, int]) -> Answer | str:
        prompt, sample = one
        if prompt["error"] is not None:
            return str(prompt["error"])
        try:
            return self.client.ask(prompt["prompt_ids"], seed_of(self.settings.seed, prompt["id"], sample))
        except RowError as error:
            return str(error)

    def _cost(self) -> Facts:
        """What was spent since the last call."""
        with self._lock:
            (since_s, num_retries), self._told = self._told, (time.perf_counter(), self.client.num_retries)
            return {
                "actor_seconds": self._told[0] - since_s,
                "retries": self._told[1] - num_retries,
            }
