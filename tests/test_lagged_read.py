"""Steps read one behind: the device has the next one before the host knows what the last one said.

A CPU computes when it is told to, so what the host must wait for is made up: a step's words are rubbish on the host
until their event is waited for, as they are in memory that a GPU has yet to copy to.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_heads import OracleHeads
from torch import Tensor

from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PAGE_SIZE
from medusa_ray.medusa.engine import Batch, Engine, Launched
from medusa_ray.medusa.scheduler import Request, Sequence
from medusa_ray.medusa.sizing import TreeSizer
from medusa_ray.medusa.tree import Tree

CHAIN = Tree.chain(3)


@pytest.fixture
def engine_of(tiny_base: Path) -> Callable[..., Engine]:
    def build(tree: Tree | None = None, replies: dict | None = None, **options) -> Engine:
        backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
        # A guess of a chain is as the replies have it, whatever the batch: so steps are the same in any.
        heads = OracleHeads(backbone.hidden_size, backbone.vocab_size, skill=1.0) if tree else None
        engine = Engine(
            backbone, heads, tree, **{"max_batch_size": 12, "max_total_tokens": 256, "lags": True, **options}
        )
        if heads:
            heads.engine, heads.replies = engine, replies
        return engine

    return build


class Late:
    """Has an engine's steps arrive when they are waited for, and writes down what came when."""

    def __init__(self, engine: Engine) -> None:
        self.order: list[str] = []
        self.num_launched = 0
        self.on_read: Callable[[int], None] = lambda number: None
        self._pass, self._launch = engine._pass, engine._launch
        engine._pass, engine._launch = self.run, self.launch  # type: ignore[method-assign]

    def run(self, token_BN: Tensor, length_B: Tensor, *rest) -> tuple[Tensor, ...]:
        is_prompt = rest[3].shape != token_BN.shape  # of its nodes one is wanted
        self.order.append("prompt" if is_prompt else f"pass {self.num_launched + 1}")
        return self._pass(token_BN, length_B, *rest)

    def launch(self, batch: Batch, tree: Tree) -> Launched:
        step = self._launch(batch, tree)
        self.num_launched += 1
        number, there_BX = self.num_launched, torch.full_like(step.verdict_BX, 10**6)

        def arrive() -> None:
            self.order.append(f"read {number}")
            self.on_read(number)
            there_BX.copy_(step.verdict_BX)

        return replace(step, verdict_BX=there_BX, event=SimpleNamespace(synchronize=arrive))


def finish(engine: Engine, requests: list[Request]) -> list[Sequence]:
    sequences = [engine.add(request) for request in requests]
    while engine.scheduler.num_open:
        engine.step()
    return sequences


def test_the_next_step_runs_before_the_last_one_is_read(engine_of):
    orders = []
    for lags in (False, True):
        engine = engine_of(lags=lags)
        late = Late(engine)
        finish(engine, [Request([1, 7, 9], max_new_tokens=4, ignore_eos=True)])
        orders.append(late.order)
    assert orders[0] == ["prompt", "pass 1", "read 1", "pass 2", "read 2", "pass 3", "read 3"]
    assert orders[1] == ["prompt", "pass 1", "pass 2", "read 1", "pass 3", "read 2", "pass 4", "read 3"]


def test_a_cpu_reads_at_once_unless_told_otherwise(engine_of):
    """Nothing runs beside the host there, and a step after the end of each reply is a step lost."""
    assert not engine_of(lags=None).lags


@pytest.fixture
def cut(prompts: list[list[int]], plain_replies: list[list[int]]) -> list[Request]:
    """Requests that end by stop tokens and limits, inside of runs and at their ends, while others go on."""
    return [
        Request(
            prompt,
            max_new_tokens=40 - 3 * i,
            stop_ids=(reply[9 + 2 * i],) if i % 3 == 0 else (),
            capture_hidden=i % 4 == 1,
            logprobs=2 if i % 5 == 2 else None,
            temperature=0.7 * (i % 6 == 4),
            seed=i,
            speculates=i != 7,
        )
        for i, (prompt, reply) in enumerate(zip(prompts, plain_replies, strict=True))
    ]


def test_what_comes_after_the_end_is_neither_said_nor_counted(engine_of, cut):
    """A step that was launched before the end was known is over in a moment and shows in no reply, but in sums."""
    known = {tuple(s.request.prompt_ids): list(s.token_ids) for s in finish(engine_of(), cut)}
    rng = random.Random(0)
    for reply in known.values():
        for i in range(rng.randrange(5), len(reply), 5):
            reply[i] = (reply[i] + 1) % 262  # guesses that are wrong at these places
    for batch_size in (12, 3):
        counted, measured, totals = [], [], []
        for lags in (False, True):
            engine = engine_of(CHAIN, known, max_batch_size=batch_size, lags=lags)
            num_free, late = engine.cache.num_free_pages, Late(engine)
            sequences = [engine.add(request) for request in cut]
            said: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
            while engine.scheduler.num_open:
                for sequence, delta in engine.step():
                    said[sequence] += delta.token_ids
            assert [said[s] for s in sequences] == [s.token_ids for s in sequences]
            counted.append([(s.token_ids, s.finish_reason, s.num_steps, s.num_guesses) for s in sequences])
            counted[-1].append([(s.accepted_histogram, len(s.hidden_parts)) for s in sequences])
            measured.append([torch.cat(s.hidden_parts) for s in sequences if s.hidden_parts])
            measured[-1] += [torch.tensor([e.logprob for e in s.logprobs]) for s in sequences]
            totals.append(engine.counters)
            assert engine.cache.num_free_pages == num_free
            assert (engine._batch, len(engine._unread)) == (None, 0)
            assert (late.num_launched > sum(entry.startswith("read") for entry in late.order)) == lags
        assert counted[0] == counted[1]
        assert totals[0] == totals[1]
        torch.testing.assert_close(measured[0], measured[1], atol=1e-4, rtol=0)
        assert totals[0].num_accepted_tokens > 0.5 * totals[0].num_drafts


def test_acceptance_is_learnt_of_what_is_said_alone(engine_of, prompts, plain_replies):
    """When those with guesses have ended, a step of the whole tree is unread whose only row had none: of no walks no
    share can be taken."""
    known = dict(zip(map(tuple, prompts), plain_replies, strict=True))
    chances = []
    for lags in (False, True):
        engine = engine_of(CHAIN, known, is_adaptive=True, lags=lags)
        engine.sizer = TreeSizer(CHAIN, {1: dict.fromkeys(engine.trees, 1.0)})
        engine.sizer.pick = lambda num_rows, share: len(CHAIN)
        requests = [Request(p, 14 + 4 * (i % 2), speculates=i < 4) for i, p in enumerate(prompts[:5])]
        finish(engine, requests)
        chances.append(engine.sizer.chances)
    assert chances[0] == chances[1]
    assert chances[0][1] > 0.5


def test_the_time_of_a_step_is_that_from_read_to_read(engine_of, monkeypatch):
    """Two are read in one call when somebody joins whose grammar needs the host."""
    now_s, took = 0.0, []

    def wait(number: int) -> None:
        nonlocal now_s
        now_s += number

    monkeypatch.setattr("medusa_ray.medusa.engine.time", SimpleNamespace(perf_counter=lambda: now_s))
    engine = engine_of()
    engine.sizer = SimpleNamespace(took=lambda *step: took.append(step), learn=lambda *_: None)
    Late(engine).on_read = wait
    engine.add(Request([1, 7, 9], max_new_tokens=6, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.add(Request([1, 8, 9], max_new_tokens=3, ignore_eos=True, allowed_tokens=Rising()))
    while engine.scheduler.num_open:
        engine.step()
    assert took == [(1, 1, 1.0), (1, 1, 2.0), (1, 1, 3.0), (2, 1, 4.0), (2, 1, 5.0)]


def test_a_reply_as_long_as_there_is_room_has_pages_for_the_step_after_it(engine_of):
    """At its last token an unread step has brought a row four tokens further, and the next one has four nodes more."""
    prompt, room = list(range(20, 102)), 2 * PAGE_SIZE - len(CHAIN)  # of which the guesses take the rest
    whole = engine_of().generate([prompt], 60, ignore_eos=True)[0].token_ids
    engine = engine_of(CHAIN, {tuple(prompt): whole}, max_batch_size=1, max_total_tokens=room)
    done = engine.generate([prompt], room - len(prompt), ignore_eos=True)[0]
    assert done.token_ids == whole[: room - len(prompt)]
    assert done.accepted_histogram[3] >= 9, "no run was as long as it may be"


def test_pages_go_to_others_at_once_and_their_beginnings_stay_right(engine_of, prompts, plain_replies):
    """A step that is under way still writes behind the tokens of those that have ended; pages are short here."""
    known = dict(zip(map(tuple, prompts), plain_replies, strict=True))
    beginning = list(range(10, 140))
    asked = [beginning + prompt[:8] for prompt in prompts] + prompts
    plain = engine_of(shares_prefixes=False, lags=False)
    replies = [plain.generate([p], 25)[0].token_ids for p in asked]
    known |= dict(zip(map(tuple, asked), replies, strict=True))
    engine = engine_of(CHAIN, known, max_batch_size=4)
    Late(engine)
    held = engine.cache.take(engine.cache.num_free_pages - 7)
    order = random.Random(0).sample(range(len(asked)), len(asked)) * 2
    done = engine.generate([asked[i] for i in order], 25)
    assert [d.token_ids for d in done] == [replies[i] for i in order]
    assert engine.counters.num_prompt_tokens < 0.8 * 2 * sum(map(len, asked)), "no beginning was shared"
    assert engine.cache.num_free_pages == 7
    engine.cache.give_back(held)


class Rising:
    """A grammar that goes by all tokens so far: each must be larger than the last, until nothing is left."""

    def __call__(self, token_ids: list[int]) -> Tensor:
        return torch.arange(262) > max(token_ids, default=5)


@pytest.mark.parametrize("settings", [{"allowed_tokens": Rising()}, {"repetition_penalty": 1.5}])
def test_a_batch_whose_host_must_know_the_tokens_is_read_at_once(engine_of, settings):
    """Others that run already may have a step unread when such a request joins them, and go on lagging after it."""
    plain = Request([1, 30, 31], max_new_tokens=40, ignore_eos=True)
    special = Request([1, 40, 41], max_new_tokens=8, ignore_eos=True, **settings)
    alone = [finish(engine_of(lags=False), [request])[0].token_ids for request in (plain, special)]
    engine = engine_of()
    late = Late(engine)
    first = engine.add(plain)
    for _ in range(4):
        engine.step()
    assert late.order[-2:] == ["pass 4", "read 3"]
    second = engine.add(special)
    engine.step()
    assert late.order[-4:] == ["prompt", "pass 5", "read 4", "read 5"]
    assert (len(first.token_ids), len(second.token_ids)) == (6, 2)
    while engine.scheduler.num_open:
        engine.step()
    assert [first.token_ids, second.token_ids] == alone
    assert late.order[-2:] == [f"pass {late.num_launched}", f"read {late.num_launched - 1}"]


def test_a_device_that_fails_ends_the_streams_as_it_does_without_lag(engine_of):
    """On a GPU an error of a step shows when the host waits for it."""
    engine = engine_of()
    num_tokens = 0

    def fail(number: int) -> None:
        if number == 3:
            raise RuntimeError("an illegal memory access")

    Late(engine).on_read = fail

    async def read() -> None:
        nonlocal num_tokens
        async for delta in engine.stream(Request([1, 7, 9], max_new_tokens=20, ignore_eos=True)):
            num_tokens += len(delta.token_ids)

    with pytest.raises(RuntimeError, match="the engine has failed: an illegal memory access"):
        asyncio.run(asyncio.wait_for(read(), 20))
    assert num_tokens == 3
    with pytest.raises(RuntimeError, match="the engine has failed"):
        engine.add(Request([1]))


@pytest.mark.gpu
@pytest.mark.parametrize("tree", [None, CHAIN])
def test_replies_on_a_gpu_are_the_same_with_lag_and_without(tiny_base, cut, tree):
    outcomes = []
    for lags in (False, None):
        backbone = Backbone.load(str(tiny_base), torch.float32, "cuda")
        heads = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
        engine = Engine(backbone, heads, tree, max_batch_size=5, max_total_tokens=256, lags=lags)
        if heads:
            known = outcomes[0] if outcomes else [[]] * len(cut)
            heads.engine = engine
            heads.replies = {tuple(r.prompt_ids): reply for r, reply in zip(cut, known, strict=True)}
        assert engine.lags == (lags is None)
        outcomes.append([sequence.token_ids for sequence in finish(engine, cut)])
    assert outcomes[0] == outcomes[1]
