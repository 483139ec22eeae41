"""Who waits, joins, runs and leaves, and which pages they hold: by the scheduler alone and by the engine's steps."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from fake_heads import OracleHeads

from medusa_ray.medusa import scheduler
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import KVShape, PagedCache
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.scheduler import QueueFull, Request, Scheduler, Sequence
from medusa_ray.medusa.tree import Tree

PIECE = 16  # tokens of a prompt that a step takes in


@pytest.fixture(params=[False, True], ids=["read at once", "read one behind"])
def engine_of(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.setattr("medusa_ray.medusa.engine.PREFILL_TOKENS", PIECE)

    def build(tree: Tree | None = None, **options) -> Engine:
        backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
        heads = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
        options = {"max_batch_size": 3, "max_total_tokens": 256, "lags": request.param, **options}
        engine = Engine(backbone, heads, tree, **options)
        if heads:
            heads.engine = engine
        return engine

    return build


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


def endless(num_prompt_tokens: int = 10, first: int = 6, **settings) -> Request:
    """One that goes on until somebody ends it, or nearly so; those with another first token share no pages."""
    prompt = [first, *(7 + i % 250 for i in range(num_prompt_tokens - 1))]
    return Request(prompt, **{"max_new_tokens": 80, "ignore_eos": True, **settings})


def lone_scheduler(num_pages: int, max_batch_size: int = 4) -> Scheduler:
    cache = PagedCache([KVShape(1, 4, 4)], num_pages, torch.float32, torch.device("cpu"))
    return Scheduler(cache, max_batch_size, num_slack=1)


def play(scheduler: Scheduler) -> None:
    """A step without a model: all prompts are taken in whole, and every running sequence gets a token."""
    scheduler.admit()
    for sequence in scheduler.running:
        sequence.extend([6])
    scheduler.start(list(scheduler.joining))
    scheduler.release()


# -------------------------------------------------------------------------------------------------- cancels


@pytest.mark.parametrize("state", ["waiting", "joining", "running"])
def test_a_cancelled_sequence_is_gone_and_holds_no_page_within_two_steps(engine_of, state):
    """Unseen, it takes the place of those that somebody waits for. The others must not notice."""
    engine = engine_of()
    total = engine.cache.num_free_pages
    others = [engine.add(endless(first=6 + i)) for i in range(3 if state == "waiting" else 2)]
    for _ in range(3):
        engine.step()
    assert engine.scheduler.running == others
    free = engine.cache.num_free_pages
    doomed = engine.add(endless(150 if state == "joining" else 10, first=20))  # 150 tokens come in ten pieces
    for _ in range(3):
        engine.step()
    assert doomed in getattr(engine.scheduler, state)
    assert bool(doomed.pages) == (state != "waiting") == (engine.cache.num_free_pages < free)
    num_tokens, num_before = len(doomed.token_ids), [len(other.token_ids) for other in others]

    engine.cancel(doomed)
    ends = [(sequence, delta) for _ in range(2) for sequence, delta in engine.step() if delta.finish_reason]
    everybody = (*engine.scheduler.waiting, *engine.scheduler.joining, *engine.scheduler.running)
    assert doomed not in everybody
    assert engine.cache.num_free_pages == free
    assert [(s, d.finish_reason, d.token_ids) for s, d in ends] == [(doomed, "cancelled", [])]
    assert len(doomed.token_ids) == num_tokens  # what it had stays
    assert [len(other.token_ids) for other in others] == [num + 2 for num in num_before]

    for other in others:
        engine.cancel(other)
    engine.step()
    assert engine.cache.num_free_pages == total
    assert engine.scheduler.num_open == 0


def test_a_cancelled_one_leaves_the_queue_although_the_head_of_the_queue_does_not_fit(engine_of):
    """Looked at only when its turn comes, it would wait, and count, as long as the one before it."""
    engine = engine_of(max_waiting=2)
    held = engine.cache.take(engine.cache.num_free_pages - 2)  # scarce: two pages are left
    running = engine.add(endless(10, max_new_tokens=50))
    head, doomed = engine.add(endless(100, first=7)), engine.add(endless(10, first=8, max_new_tokens=20))
    engine.step()
    assert engine.scheduler.running == [running]
    assert list(engine.scheduler.waiting) == [head, doomed]
    engine.cancel(doomed)
    engine.step()
    assert list(engine.scheduler.waiting) == [head]
    assert (doomed.finish_reason, engine.scheduler.num_open) == ("cancelled", 2)
    engine.cache.give_back(held)


def test_a_cancel_beside_a_running_step_is_not_forgotten(engine_of, monkeypatch):
    """It comes from another thread, as when a client hangs up in the middle of a step."""
    engine = engine_of()
    sequences = [engine.add(endless(first=6 + i)) for i in range(5)]
    engine.step()
    move_on, run = engine._move_on, engine._run

    def cancel_meanwhile(*tensors):
        thread = threading.Thread(target=lambda: [engine.cancel(sequence) for sequence in sequences])
        thread.start()
        thread.join()
        return run(*tensors)

    monkeypatch.setattr(engine, "_run", cancel_meanwhile)
    assert move_on()
    monkeypatch.setattr(engine, "_run", run)
    engine.step()
    assert [sequence.finish_reason for sequence in sequences] == ["cancelled"] * 5
    assert engine.scheduler.num_open == 0
    assert not engine.scheduler.work.is_set()


def test_a_cancel_after_the_end_changes_nothing(engine_of):
    engine = engine_of()
    sequence = engine.add(endless(max_new_tokens=3))
    while not sequence.finish_reason:
        engine.step()
    engine.cancel(sequence)
    assert engine.step() == []
    assert sequence.finish_reason == "length"


def test_a_stream_that_is_left_stops_what_it_asked_for(engine_of):
    """It would end by itself as well, a hundred tokens later, and nothing but the time would tell."""
    engine = engine_of()

    async def leave() -> None:
        stream = engine.stream(endless(max_new_tokens=200))
        assert (await anext(stream)).token_ids
        await stream.aclose()
        while engine.scheduler.num_open:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert engine.counters.num_generated_tokens < 100
    assert not engine._readers


# ------------------------------------------------------------------------------------------------ deadlines


@pytest.mark.parametrize("state", ["waiting", "joining", "running"])
def test_a_deadline_ends_a_request_wherever_it_is_and_keeps_what_it_has(engine_of, clock, state):
    engine = engine_of(max_batch_size=2)
    total = engine.cache.num_free_pages
    others = [engine.add(endless(first=6 + i)) for i in range(2 if state == "waiting" else 1)]
    engine.step()
    late = engine.add(endless(150 if state == "joining" else 10, first=20, deadline_s=5.0))
    for _ in range(4):
        clock.now_s += 1.2
        engine.step()
    assert late in getattr(engine.scheduler, state)
    num_tokens = len(late.token_ids)
    assert bool(num_tokens) == (state == "running")
    clock.now_s += 0.2
    ends = [(sequence, delta) for sequence, delta in engine.step() if delta.finish_reason]
    assert [(s, d.finish_reason, d.token_ids) for s, d in ends] == [(late, "deadline", [])]
    assert len(late.token_ids) == num_tokens
    assert late not in (*engine.scheduler.waiting, *engine.scheduler.joining, *engine.scheduler.running)
    for other in others:
        engine.cancel(other)
    engine.step()
    assert engine.cache.num_free_pages == total


def test_each_of_those_that_wait_has_its_own_deadline(engine_of, clock):
    """Who waits is looked at only when somebody must go: the next deadline must not be lost with the one before."""
    engine = engine_of(max_batch_size=1)
    running = engine.add(endless())
    engine.step()
    waiting = [
        engine.add(endless(first=7 + i, deadline_s=deadline_s)) for i, deadline_s in enumerate((3, 1, 2))
    ]
    patient = engine.add(endless(first=30))
    gone = []
    for _ in range(4):
        clock.now_s += 1
        gone.append([sequence for sequence, delta in engine.step() if delta.finish_reason])
    assert gone == [[waiting[1]], [waiting[2]], [waiting[0]], []]
    assert list(engine.scheduler.waiting) == [patient]
    assert engine.scheduler.running == [running]


def test_generate_says_which_replies_the_deadline_cut(engine_of, clock, monkeypatch):
    engine = engine_of()
    whole = engine.generate([endless().prompt_ids], 40, ignore_eos=True)[0]
    take_in = engine._take_in

    def slow_step():
        clock.now_s += 1
        return take_in()

    monkeypatch.setattr(engine, "_take_in", slow_step)
    (cut,) = engine.generate([endless().prompt_ids], 40, ignore_eos=True, deadline_s=10.5)
    # A step takes a second, and the first one gives two tokens, of which one may be unread.
    assert (cut.finish_reason, cut.token_ids) == ("deadline", whole.token_ids[: 11 - engine.lags])


@pytest.mark.parametrize("deadline_s", [0, -1.0, float("nan")])
def test_a_deadline_that_is_none_is_refused(engine_of, deadline_s):
    with pytest.raises(ValueError, match=r"deadline_s is .*; expected more than 0 seconds"):
        engine_of().add(endless(deadline_s=deadline_s))


# --------------------------------------------------------------------------------------------- bounded queue


def test_one_request_too_many_is_refused_with_both_numbers_and_a_later_one_taken(engine_of):
    engine = engine_of(max_batch_size=2, max_waiting=1)
    sequences = [engine.add(endless(first=6 + i)) for i in range(3)]  # all at once, before any step
    with pytest.raises(QueueFull, match=r"3 requests run or wait here, and no more than 3 may"):
        engine.add(endless(first=30))
    engine.step()
    with pytest.raises(QueueFull):
        engine.add(endless(first=30))
    engine.cancel(sequences[0])
    engine.step()
    sequences.append(engine.add(endless(first=30)))
    with pytest.raises(QueueFull):
        engine.add(endless(first=31))
    for sequence in sequences:
        engine.cancel(sequence)
    engine.step()
    assert engine.scheduler.num_open == 0


def test_without_a_queue_there_is_room_for_a_batch(engine_of):
    """Counting those that have not joined yet as a queue would refuse everybody."""
    engine = engine_of(max_batch_size=2, max_waiting=0)
    for first in (6, 7):
        engine.add(endless(first=first))
    with pytest.raises(QueueFull, match="no more than 2 may"):
        engine.add(endless(first=8))


def test_generate_takes_more_prompts_than_may_wait(engine_of, prompts, plain_replies):
    engine = engine_of(max_batch_size=2, max_waiting=1)
    assert [done.token_ids for done in engine.generate(prompts, 40)] == plain_replies


# -------------------------------------------------------------------------------------------------- fairness


def test_a_long_prompt_that_needs_most_pages_gets_in_amid_a_stream_of_short_ones():
    """Let whatever fits go first, and it never gets in: some short one always takes the pages that came free."""
    scheduler = lone_scheduler(num_pages=8, max_batch_size=16)
    short = {"max_new_tokens": 20, "ignore_eos": True}  # a page each
    for first in range(6):
        scheduler.add(Sequence(Request([first], **short), frozenset()))
        play(scheduler)
    long = Sequence(
        Request([7] * 400, max_new_tokens=40, ignore_eos=True), frozenset()
    )  # seven of the eight pages
    scheduler.add(long)
    steps = 0
    while not long.pages:
        scheduler.add(Sequence(Request([50 + steps], **short), frozenset()))
        play(scheduler)
        steps += 1
        assert steps <= 21, "longer than the longest reply of those before it"


def test_who_comes_first_joins_first_and_late_arrivals_get_their_turn(engine_of):
    """However many came before and however long their prompts are; and no prompt waits behind shorter ones."""
    engine = engine_of(max_batch_size=3)
    lengths = [10, 120, 12, 90, 11, 150, 9, 14, 100, 8]
    sequences = [engine.add(endless(n, first=6 + i, max_new_tokens=6)) for i, n in enumerate(lengths)]
    joined, started = [], []
    bound = sum(-(-n // PIECE) for n in lengths) + 6 * len(lengths)
    for steps in range(bound):
        if steps % 3 == 0 and len(sequences) < 40:  # and shorter ones keep coming
            sequences.append(engine.add(endless(5, first=100 + len(sequences), max_new_tokens=6)))
        engine.step()
        for sequence in sequences:
            if sequence.pages and sequence not in joined:
                joined.append(sequence)
            if sequence.token_ids and sequence not in started:
                started.append(sequence)
        if all(sequence in started for sequence in sequences[: len(lengths)]):
            break
    else:
        pytest.fail(f"after {bound} steps some of the first ones have not begun")
    assert joined == sequences[: len(joined)]


def test_the_oldest_prompt_moves_on_with_every_step(engine_of):
    """Those most like each other in length go together, and a long one is like none of the short ones."""
    engine = engine_of(max_batch_size=4)
    long = engine.add(endless(160, first=6))
    steps = 0
    while not long.token_ids:
        engine.add(endless(5, first=50 + steps, max_new_tokens=1))
        engine.step()
        steps += 1
        assert long.num_prefilled == min(steps * PIECE, 160)
    assert steps == 10
