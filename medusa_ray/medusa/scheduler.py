"""Requests -> the sequences that run together: who waits, who joins, who leaves, and which pages they hold.

A sequence gets all the pages that it can ever need when it joins, so a running sequence never has to be stopped for
want of memory. Nobody overtakes: the oldest of those that wait gets the pages that running ones leave.
"""

import math
import numbers
import random
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from medusa_ray.medusa.acceptance import Logprob
from medusa_ray.medusa.cache import PAGE_SIZE, PagedCache
from medusa_ray.medusa.sampling import Settings, is_whole


@dataclass(frozen=True)
class Request(Settings):
    """What a caller wants continued, and how; the fields of Settings are given by name."""

    prompt_ids: list[int]
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence tokens
    ignore_eos: bool = False
    capture_hidden: bool = False
    deadline_s: float | None = None  # from `add` on; past it the reply ends with what it has

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for what is out of its range, which may be the vocabulary's."""
        if not isinstance(self.prompt_ids, list):
            raise ValueError(
                f"the prompt is of type {type(self.prompt_ids).__name__}; expected a list of token ids."
            )
        if not self.prompt_ids:
            raise ValueError("the prompt has no tokens; send at least one.")
        if not is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens!r}; expected a whole number, at least 1."
            )
        limit_s = math.inf if self.deadline_s is None else self.deadline_s
        if not isinstance(limit_s, numbers.Real) or not limit_s > 0:  # NaN too
            raise ValueError(f"deadline_s is {limit_s!r}; expected more than 0 seconds.")
        _check_token_ids("the prompt has", self.prompt_ids, vocab_size)
        _check_token_ids("stop_ids have", self.stop_ids, vocab_size)
        super().check(vocab_size)


def _check_token_ids(what: str, ids: Collection[int], vocab_size: int) -> None:
    # Prompts are long, so no loop of Python's own sees each token of a right one.
    are_whole = all(kind is not bool and issubclass(kind, numbers.Integral) for kind in set(map(type, ids)))
    if are_whole and (not ids or 0 <= min(ids) <= max(ids) < vocab_size):
        return
    wrong = next(t for t in ids if not is_whole(t) or not 0 <= t < vocab_size)
    raise ValueError(f"{what} the token id {wrong!r}, outside 0 ... {vocab_size - 1}.")


class QueueFull(Exception):
    """As many requests run or wait as may; a later one may find room."""


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens so far and what they took."""

    request: Request
    eos_ids: frozenset[int]
    seed: int = 0
    token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_prefilled: int = 0  # tokens of the prompt that are in the cache
    logprobs: list[Logprob] = field(default_factory=list)
    num_steps: int = 0
    num_guesses: int = 0
    accepted_histogram: list[int] = field(default_factory=list)
    hidden_parts: list[Tensor] = field(default_factory=list)
    finish_reason: str | None = None  # stop | length | deadline | cancelled
    is_cancelled: bool = False  # by `Scheduler.cancel`; the step after that ends it
    came_s: float = field(init=False)  # on the monotonic clock
    queue_s: float = 0.0  # from then to its joining
    ends_by_s: float = math.inf  # on the monotonic clock

    def __post_init__(self) -> None:
        self.seed = random.getrandbits(62) if self.request.seed is None else self.request.seed
        self.came_s = time.monotonic()
        if self.request.deadline_s is not None:
            self.ends_by_s = self.came_s + self.request.deadline_s

    def end_early(self, now_s: float) -> bool:
        """Ends it if it was cancelled or is past its deadline; returns whether."""
        if self.is_cancelled:
            self.finish_reason = "cancelled"
        elif self.ends_by_s <= now_s:
            self.finish_reason = "deadline"
        return self.finish_reason is not None

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are not in the cache yet."""
        return len(self.request.prompt_ids) - self.num_prefilled

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the root."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1

    @property
    def num_slack(self) -> int:
        """Slots that its pages have beyond its last token."""
        return len(self.pages) * PAGE_SIZE - len(self.request.prompt_ids) - self.request.max_new_tokens

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end the reply."""
        stop_ids = frozenset(self.request.stop_ids)
        return stop_ids if self.request.ignore_eos else stop_ids | self.eos_ids

    def extend(self, committed: list[int]) -> list[int]:
        """Takes in the tokens of a walk up to the one that ends the reply; returns those taken.

        A token of -1 ends it too, where allowed_tokens let nothing follow, and is not taken.
        """
        room = self.request.max_new_tokens - len(self.token_ids)
        taken = committed[:room]
        end_ids = self.end_ids
        for i, token in enumerate(taken):
            if token in end_ids or token < 0:
                taken, self.finish_reason = taken[: i + (token >= 0)], "stop"
                break
        else:
            if len(taken) == room:
                self.finish_reason = "length"
        self.token_ids += taken
        return taken

    def count(self, num_guesses: int, num_taken: int) -> None:
        """Takes in what a step took."""
        accepted = max(num_taken - 1, 0)  # none is taken where nothing was allowed to follow
        self.accepted_histogram += [0] * (accepted + 1 - len(self.accepted_histogram))
        self.accepted_histogram[accepted] += 1
        self.num_steps += 1
        self.num_guesses += num_guesses


class Scheduler:
    """First come, first served, as rows and pages allow."""

    def __init__(
        self, cache: PagedCache, max_batch_size: int, num_slack: int, max_waiting: int | None = None
    ) -> None:
        """max_waiting: requests that may be there beyond those that have a row; None for any number."""
        self.cache, self.max_batch_size = cache, max_batch_size
        self.num_slack = num_slack  # slots that a step's guesses may take beyond the last token
        self.max_open = math.inf if max_waiting is None else max_batch_size + max_waiting
        self.num_open = 0  # all of those below
        self.waiting: deque[Sequence] = deque()
        self.joining: list[Sequence] = []  # they hold pages, and their prompts are on the way into these
        self.running: list[Sequence] = []
        self.num_queried_tokens = 0  # of the prompts that have joined
        self.num_shared_tokens = 0  # of those, the ones that were in the cache already
        self.work = threading.Event()  # set while somebody waits or runs
        self._lock = threading.Lock()  # for what `add` and `cancel` change
        self._look_at_s = math.inf  # not before then has anybody to go who waits

    @property
    def has_room(self) -> bool:
        return self.num_open < self.max_open

    def check_room(self, num: int = 1) -> None:
        """Raises QueueFull where max_waiting forbids so many more."""
        if self.num_open + num > self.max_open:
            raise QueueFull(
                f"{self.num_open} requests run or wait here, and no more than {self.max_open} may, of which "
                f"{self.max_batch_size} run"
            )

    def add(self, sequence: Sequence) -> None:
        """Safe to call while a step runs in another thread. Raises as check_room does."""
        with self._lock:
            self.check_room()
            self.num_open += 1
            self.waiting.append(sequence)
            self._look_at_s = min(self._look_at_s, sequence.ends_by_s)
        self.work.set()

    def cancel(self, sequence: Sequence) -> None:
        """Lets the next step end a sequence, wherever it is. Safe to call while a step runs in another thread."""
        with self._lock:
            sequence.is_cancelled = True
            self._look_at_s = -math.inf

    def end_early(self) -> list[Sequence]:
        """Ends the sequences that were cancelled or are past their deadline; `release` takes their pages."""
        now_s = time.monotonic()
        ended = [sequence for sequence in (*self.joining, *self.running) if sequence.end_early(now_s)]
        with self._lock:
            if self._look_at_s <= now_s:
                gone = [sequence for sequence in self.waiting if sequence.end_early(now_s)]
                self.waiting = deque(sequence for sequence in self.waiting if sequence.finish_reason is None)
                self._look_at_s = min((sequence.ends_by_s for sequence in self.waiting), default=math.inf)
                ended += gone
        return ended

    def admit(self) -> None:
        """Lets waiting sequences join while there is room."""
        while self.waiting and len(self.joining) + len(self.running) < self.max_batch_size:
            request = self.waiting[0].request
            shared = self.cache.share(request.prompt_ids)
            num_pages = PagedCache.pages_for(
                len(request.prompt_ids) + request.max_new_tokens + self.num_slack
            )
            if num_pages - len(shared) > self.cache.num_free_pages:
                self.cache.give_back(shared)
                break
            sequence = self.waiting.popleft()
            sequence.pages = shared + self.cache.take(num_pages - len(shared))
            sequence.num_prefilled = len(shared) * PAGE_SIZE
            sequence.queue_s = time.monotonic() - sequence.came_s
            self.num_queried_tokens += len(request.prompt_ids)
            self.num_shared_tokens += sequence.num_prefilled
            self.joining.append(sequence)

    def next_group(self, max_tokens: int) -> list[Sequence]:
        """Joining sequences whose next pieces go through the base together, padded to the longest of them.

        The oldest is always among them, so that no prompt waits for ever; then those most like it in length.
        """
        if not self.joining:
            return []
        oldest, *others = self.joining
        wanted = min(oldest.num_left, max_tokens)
        group, longest = [oldest], wanted
        for sequence in sorted(others, key=lambda other: abs(min(other.num_left, max_tokens) - wanted)):
            longest = max(longest, min(sequence.num_left, max_tokens))
            if (len(group) + 1) * longest > max_tokens:
                break
            group.append(sequence)
        return group

    def start(self, sequences: list[Sequence]) -> None:
        """Lets sequences run whose prompts are whole in the cache."""
        for sequence in sequences:
            self.cache.keep(sequence.request.prompt_ids, sequence.pages)
        self.joining = [sequence for sequence in self.joining if sequence not in sequences]
        self.running += sequences

    def release(self) -> list[int]:
        """Lets sequences go that have ended, with their pages; returns the running rows that stay."""
        for sequence in (*self.joining, *self.running):
            if sequence.finish_reason:
                self.cache.give_back(sequence.pages)
        self.joining = [sequence for sequence in self.joining if not sequence.finish_reason]
        stay = [row for row, sequence in enumerate(self.running) if not sequence.finish_reason]
        self.running = [self.running[row] for row in stay]
        with self._lock:
            self.num_open = len(self.waiting) + len(self.joining) + len(self.running)
            if not self.num_open:
                self.work.clear()
        return stay
