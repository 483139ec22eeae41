"""Thousands of mixed requests through one engine: nothing is left of any of them, whichever way it ended."""

import asyncio
import ctypes
import gc
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_heads import OracleHeads

from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PAGE_SIZE
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.scheduler import Sequence
from medusa_ray.medusa.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1)])
NUM_KINDS = 240  # different requests
ROUND = 50  # requests of a round
NUM_HELD = 60  # of 72 pages: with twelve left, rows wait for pages and kept beginnings are forgotten
AT_ONCE_S, MIDWAY_S, LATER_S = (
    1e-9,
    0.02,
    600,
)  # deadlines that are surely missed, may be missed, and surely kept


def engine_of(base: Path, tree: Tree | None, **options) -> Engine:
    backbone = Backbone.load(str(base), torch.float32, "cpu")
    heads = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
    engine = Engine(backbone, heads, tree, **{"max_batch_size": 12, "max_total_tokens": 320, **options})
    if heads:
        heads.engine = engine
    return engine


def kinds_of_requests() -> list[Request]:
    """Short and long prompts, many of which begin alike, with all manner of settings; each prompt is another one."""
    rng = random.Random(0)
    beginnings = [[1, *(rng.randrange(6, 262) for _ in range(n - 1))] for n in (70, 130, 200)]
    requests = []
    for i in range(NUM_KINDS):
        beginning = rng.choice(beginnings) if i % 3 == 0 else [1]
        prompt = beginning + [rng.randrange(6, 262) for _ in range(rng.choice([3, 10, 30, 60]))]
        choices = {
            "top_p": rng.uniform(0.5, 0.98),
            "min_p": rng.uniform(0.01, 0.3),
            "top_k": rng.randint(2, 60),
            "repetition_penalty": rng.uniform(1.05, 2),
            "frequency_penalty": rng.uniform(-2, 2),
            "logit_bias": {rng.randrange(262): rng.uniform(-10, 3) for _ in range(5)},
        }
        fields = {name: choices[name] for name in rng.sample(sorted(choices), rng.choice([0, 0, 1, 2]))}
        fields |= {"logprobs": rng.randint(0, 3)} if i % 4 == 1 else {}
        fields |= {"stop_ids": tuple(rng.sample(range(262), 20))} if i % 6 == 5 else {}
        requests.append(
            Request(
                prompt,
                max_new_tokens=rng.choice([1, 4, 8, 16, 30]),
                temperature=rng.choice([0, 0.7, 1.0]),
                seed=i,
                capture_hidden=i % 5 == 2,
                speculates=i % 7 != 3,
                **fields,
            )
        )
    return requests


class Campaign:
    """Plays rounds of requests, and counts how they ended and what else came about."""

    def __init__(self, engine: Engine, requests: list[Request], replies: list[list[int]], seed: int) -> None:
        self.engine, self.requests, self.replies = engine, requests, replies
        self.rng, self.seen = random.Random(seed), Counter()

    def draw(self) -> tuple[Request, bool]:
        """A request, and whether it is to be cancelled."""
        request = self.rng.choice(self.requests)
        deadline_s = self.rng.choices([None, LATER_S, MIDWAY_S, AT_ONCE_S], [8, 1, 1, 1])[0]
        # A copy of its own, as a server has: what is kept of it would show as a leak.
        fields = {**request.__dict__, "prompt_ids": list(request.prompt_ids), "deadline_s": deadline_s}
        return Request(**fields), self.rng.random() < 0.2

    def judge(self, request: Request, token_ids: list[int], reason: str | None) -> None:
        """A reply is what the base alone says; one that was cut is the beginning of that."""
        expected = self.replies[request.seed]
        assert token_ids == (expected if reason in ("stop", "length") else expected[: len(token_ids)])
        if request.deadline_s == AT_ONCE_S:
            assert (token_ids, reason in ("deadline", "cancelled", None)) == ([], True)
        if reason == "deadline" and token_ids:
            self.seen["deadline while running"] += 1
        self.seen[reason or "left"] += 1

    def step_through(self, num: int) -> None:
        """They come by `add` at random times, and are cancelled wherever they are then."""
        engine, rng = self.engine, self.rng
        coming, sequences, doomed = [self.draw() for _ in range(num)], [], []
        while coming or engine.scheduler.num_open:
            for _ in range(rng.randrange(5)):
                if coming:
                    request, is_doomed = coming.pop()
                    sequences.append(engine.add(request))
                    doomed += [sequences[-1]] * is_doomed
            if doomed and rng.random() < 0.4:
                sequence = doomed.pop(rng.randrange(len(doomed)))
                self.seen[f"cancelled while {self._state(sequence)}"] += 1
                engine.cancel(sequence)
            engine.step()
        for sequence in sequences:
            self.judge(sequence.request, sequence.token_ids, sequence.finish_reason)
            num_tokens = len(sequence.token_ids)
            if sequence.request.capture_hidden:
                assert sum(map(len, sequence.hidden_parts)) == num_tokens
            if sequence.request.logprobs is not None:
                assert [entry.token_id for entry in sequence.logprobs] == sequence.token_ids

    def _state(self, sequence: Sequence) -> str:
        scheduler = self.engine.scheduler
        for state in ("waiting", "joining", "running"):
            if sequence in getattr(scheduler, state):
                return state
        return "over"

    async def stream_through(self, num: int) -> None:
        """They come as streams, all at a time or one after the other; clients leave between two deltas or in one."""
        waits = [self.rng.choice([0, 0, 0.002, 0.02]) for _ in range(num)]
        await asyncio.gather(*(self._read(*self.draw(), wait_s) for wait_s in waits))
        while self.engine.scheduler.num_open:
            await asyncio.sleep(0.001)

    async def _read(self, request: Request, is_doomed: bool, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        token_ids: list[int] = []
        reason = None
        limit = self.rng.randrange(4) if is_doomed and self.rng.random() < 0.5 else None

        async def read() -> None:
            nonlocal reason
            stream = self.engine.stream(request)
            num_deltas = 0
            async for delta in stream:
                token_ids.extend(delta.token_ids)
                reason, num_deltas = delta.finish_reason, num_deltas + 1
                if num_deltas == limit:
                    break
            await stream.aclose()

        reading = asyncio.create_task(read())
        if is_doomed and limit is None:
            await asyncio.sleep(self.rng.uniform(0, 0.03))
            reading.cancel()
        await asyncio.gather(reading, return_exceptions=is_doomed)
        self.judge(request, token_ids, reason)


def resident_bytes() -> int:
    """What the process holds, after what it could give back: freed memory that malloc keeps is no leak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_nothing_is_left(engine: Engine, held: list[int]) -> None:
    scheduler, cache = engine.scheduler, engine.cache
    assert [*scheduler.waiting, *scheduler.joining, *scheduler.running] == []
    assert scheduler.num_open == 0
    assert not engine._readers
    assert engine._batch is None
    assert not engine._unread
    num_pages = len(cache.keys[0]) // PAGE_SIZE - 1
    assert cache.num_free_pages == num_pages - len(held)
    assert [page for page, num in enumerate(cache._num_users) if num] == sorted(held), (
        "a page has users, or too few"
    )
    assert sorted([*cache._free, *cache._idle, *held]) == list(range(1, num_pages + 1)), (
        "a page is there twice"
    )


@pytest.mark.parametrize(
    ("num_requests", "num_before", "lags"),
    [
        (400, 200, False),
        (400, 200, True),
        pytest.param(10_000, 1000, False, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)]),
        pytest.param(10_000, 1000, True, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)]),
    ],
)
def test_nothing_is_left_of_thousands_of_mixed_requests(
    tiny_base, monkeypatch, num_requests, num_before, lags
):
    """A page, a reader or a reply that is kept of one in a hundred ends a server after days."""
    monkeypatch.setattr("medusa_ray.medusa.engine.PREFILL_TOKENS", 64)
    requests = kinds_of_requests()
    alone = engine_of(tiny_base, None, shares_prefixes=False)
    replies = []
    for request in requests:
        sequence = alone.add(request)
        while not sequence.finish_reason:
            alone.step()
        replies.append(sequence.token_ids)
    campaigns, held = [], []
    for seed in range(2):  # one for each way in, since an engine that has a thread is not stepped by hand
        engine = engine_of(tiny_base, TREE, lags=lags)
        engine.heads.replies = {
            tuple(r.prompt_ids): reply for r, reply in zip(requests, replies, strict=True)
        }
        campaigns.append(Campaign(engine, requests, replies, seed))
        held.append(engine.cache.take(NUM_HELD))
    by_step, by_stream = campaigns

    started_s, resident = time.monotonic(), {}
    for num_done in range(0, num_requests, 2 * ROUND):
        by_step.step_through(ROUND)
        asyncio.run(by_stream.stream_through(ROUND))
        for campaign, pages in zip(campaigns, held, strict=True):
            assert_nothing_is_left(campaign.engine, pages)
        if (num_done + 2 * ROUND) % num_before == 0:
            resident[num_done + 2 * ROUND] = resident_bytes()
    growth = resident[num_requests] - resident[num_before]

    seen = by_step.seen + by_stream.seen
    print(
        f"\n{num_requests} requests in {time.monotonic() - started_s:.0f} s; MiB resident after so many:",
        end=" ",
    )
    print({num: round(size / 2**20, 1) for num, size in resident.items()}, dict(seen))
    for campaign in campaigns:
        totals = campaign.engine.counters
        print(totals)
        assert totals.num_accepted_tokens > 0.3 * totals.num_drafts, "the guesses were not accepted"
    assert growth <= 20 * 2**20
    cancels = [f"cancelled while {state}" for state in ("waiting", "joining", "running")]
    for what in ("stop", "length", "deadline", "left", *cancels):
        assert seen[what] > num_requests / 1000, f"{what} was not tried"
