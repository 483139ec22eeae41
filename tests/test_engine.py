import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_heads import OracleHeads
from transformers import AutoModelForCausalLM

from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PagedCache
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.scheduler import Sequence
from medusa_ray.medusa.sizing import TreeSizer
from medusa_ray.medusa.tree import Tree

TREES = {
    "chain": Tree.chain(3),
    "tree": Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1)]),
}


def engine_of(base: Path, tree: Tree | None = None, **options) -> Engine:
    backbone = Backbone.load(str(base), torch.float32, "cpu")
    heads = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
    engine = Engine(backbone, heads, tree, **{"max_total_tokens": 256, **options})
    if heads:
        heads.engine = engine
    return engine


@pytest.mark.parametrize(("batch_size", "lags"), [(1, False), (1, True), (4, True), (12, False)])
@pytest.mark.parametrize("tree", [None, "chain", "tree"])
def test_greedy_replies_equal_those_of_generate(tiny_base, prompts, plain_replies, tree, batch_size, lags):
    """A mask off by one, a wrong position or a missed move still gives fluent text; only equality shows it."""
    engine = engine_of(tiny_base, TREES.get(tree), max_batch_size=batch_size, lags=lags)
    if tree:
        engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
    done = engine.generate(prompts, max_new_tokens=40)
    assert [d.token_ids for d in done] == plain_replies
    steps = sum(d.num_steps for d in done)
    tokens = sum(len(d.token_ids) - 1 for d in done)
    assert tokens == sum(j * n + n for d in done for j, n in enumerate(d.accepted_histogram))
    if tree:
        assert tokens / steps > 1.3, "the guesses were not accepted, so acceptance was not tested"
    else:
        assert tokens == steps
    assert engine.cache.num_free_pages == len(engine.cache.keys[0]) // 64 - 1, "pages were not given back"


@pytest.mark.parametrize(("tree", "lags"), [("chain", False), ("tree", False), ("tree", True)])
def test_seeded_sampling_gives_the_baselines_tokens_with_any_tree(tiny_base, prompts, tree, lags):
    settings = {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.9, "seed": list(range(len(prompts)))}
    alone = [
        engine_of(tiny_base).generate([p], **{**settings, "seed": s})[0].token_ids
        for s, p in enumerate(prompts)
    ]
    engine = engine_of(tiny_base, TREES[tree], max_batch_size=5, lags=lags)
    engine.heads.replies = {tuple(p): r for p, r in zip(prompts, alone, strict=True)}
    done = engine.generate(prompts, **settings)
    assert [d.token_ids for d in done] == alone
    assert sum(map(len, alone)) / sum(d.num_steps for d in done) > 1.3


@pytest.mark.parametrize(("tree", "lags"), [(None, False), ("tree", False), ("tree", True)])
def test_prompts_in_pieces_give_the_same_replies(tiny_base, prompts, plain_replies, tree, lags, monkeypatch):
    """A piece that forgets the one before it, or sees its own padding, still gives fluent text."""
    monkeypatch.setattr("medusa_ray.medusa.engine.PREFILL_TOKENS", 16)
    engine = engine_of(tiny_base, TREES.get(tree), max_batch_size=5, lags=lags)
    if tree:
        engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies
    assert engine.counters.num_prompt_tokens == sum(map(len, prompts))


def test_a_long_prompt_does_not_stall_those_that_run(tiny_base, prompts, monkeypatch):
    monkeypatch.setattr("medusa_ray.medusa.engine.PREFILL_TOKENS", 16)
    engine = engine_of(tiny_base)
    running = engine.add(Request(prompts[0][:10], max_new_tokens=20, ignore_eos=True))
    engine.step()
    long = engine.add(Request([7] * 160, max_new_tokens=5))
    for step in range(1, 10):
        engine.step()
        assert len(running.token_ids) == 2 + step  # it moves on with each piece of the other's prompt
    assert long.num_prefilled == 9 * 16


def test_a_shared_beginning_is_computed_once_and_changes_no_reply(tiny_base, prompts):
    """Keys and values that belong to another beginning, or that a later step overwrote, would show in the text."""
    beginning = [1, *(6 + i % 250 for i in range(149))]
    asked = [beginning[:length] + prompt[1:20] for prompt in prompts for length in (60, 100, 140, 150)]
    plain = engine_of(tiny_base, shares_prefixes=False)
    expected = [plain.generate([p], 20)[0].token_ids for p in asked]
    engine = engine_of(tiny_base, TREES["tree"], max_batch_size=3)
    engine.heads.replies = {tuple(p): r for p, r in zip(asked, expected, strict=True)}
    assert [d.token_ids for d in engine.generate(asked, max_new_tokens=20)] == expected
    assert engine.counters.num_prompt_tokens < 0.6 * plain.counters.num_prompt_tokens


def random_schedule(
    engine: Engine, requests: list[Request], chance: random.Random, seen: Counter
) -> list[Sequence]:
    """Plays the requests: they come at random times, and somewhere on its way one in three is cancelled or late."""
    coming, sequences, doomed = list(requests), [], []
    chance.shuffle(coming)
    while coming or engine.scheduler.num_open:
        for _ in range(chance.randrange(4)):
            if coming:
                deadline_s = chance.randrange(1, 25) if chance.random() < 0.2 else None
                sequences.append(engine.add(replace(coming.pop(), deadline_s=deadline_s)))
                if chance.random() < 0.2:
                    doomed.append(sequences[-1])
        if doomed and chance.random() < 0.3:
            in_pieces = [sequence for sequence in doomed if sequence in engine.scheduler.joining]
            sequence = (in_pieces or doomed)[-1]
            doomed.remove(sequence)
            engine.cancel(sequence)
        engine.step()
        seen["in pieces"] += any(sequence.num_prefilled % 64 for sequence in engine.scheduler.joining)
    for sequence in sequences:
        state = "running" if sequence.token_ids else "joining" if sequence.pages else "waiting"
        seen[f"{sequence.finish_reason}, {state}"] += 1
    return sequences


@pytest.mark.parametrize(
    "num_schedules", [25, pytest.param(1000, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)])]
)
def test_a_request_gives_the_same_reply_in_any_schedule(tiny_base, prompts, num_schedules, monkeypatch):
    """Whoever joins, leaves or is cancelled beside it, in however many pieces its prompt is taken in, and whether steps
    are read at once or one behind."""
    requests = [
        Request(
            p, max_new_tokens=4 + 3 * i, temperature=0.8 * (i % 2), top_p=0.9, seed=i, speculates=i % 4 != 1
        )
        for i, p in enumerate(prompts)
    ]
    plain = engine_of(tiny_base)
    alone = [
        plain.generate(
            [r.prompt_ids], r.max_new_tokens, temperature=r.temperature, top_p=r.top_p, seed=r.seed
        )[0].token_ids
        for r in requests
    ]
    engines = [
        engine_of(tiny_base, TREES["tree"], max_batch_size=6, max_total_tokens=160, lags=lags)
        for lags in (False, True)
    ]
    for engine in engines:
        engine.heads.replies = {tuple(r.prompt_ids): reply for r, reply in zip(requests, alone, strict=True)}
    ticks = itertools.count()  # a clock that a step, or an `add` with a deadline, moves on
    monkeypatch.setattr("medusa_ray.medusa.scheduler.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    free, seen, share = [engine.cache.num_free_pages for engine in engines], Counter(), PagedCache.share

    def counted_share(cache, prompt_ids):
        pages = share(cache, prompt_ids)
        seen["shares a beginning"] += bool(pages)
        return pages

    monkeypatch.setattr(PagedCache, "share", counted_share)
    for seed in range(num_schedules):
        engine = engines[seed % 2]
        monkeypatch.setattr(
            "medusa_ray.medusa.engine.PREFILL_TOKENS", random.Random(seed).choice([16, 64, 512])
        )
        for sequence in random_schedule(engine, requests, random.Random(seed), seen):
            expected = alone[sequence.request.seed]
            if sequence.finish_reason in ("cancelled", "deadline"):
                assert sequence.token_ids == expected[: len(sequence.token_ids)]
            else:
                assert sequence.token_ids == expected
        assert engine.cache.num_free_pages == free[seed % 2]
    print(dict(seen))
    ways = itertools.product(("cancelled", "deadline"), ("waiting", "joining", "running"))
    wanted = ["length, running", "in pieces", "shares a beginning", *map(", ".join, ways)]
    assert all(seen[what] for what in wanted), seen


def test_an_adaptive_tree_changes_the_steps_and_not_the_reply(tiny_base, prompts, plain_replies):
    engine = engine_of(tiny_base, TREES["tree"], max_batch_size=4, is_adaptive=True)
    engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
    # Each size in turn, whatever it costs.
    sizes = itertools.cycle(engine.trees)
    engine.sizer = TreeSizer(engine.tree, {1: dict.fromkeys(engine.trees, 1.0)})
    engine.sizer.pick = lambda num_rows, share: next(sizes)
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies
    assert list(engine.trees) == [1, 2, 3, 5, 9]
    assert engine.sizer.chances[1] != 0.5, "nothing was learnt"


def test_step_times_cover_every_size_up_to_a_full_batch(tiny_base):
    heads = MedusaHeads(hidden_size=32, vocab_size=262)
    engine = Engine(Backbone.load(str(tiny_base), torch.float32, "cpu"), heads, TREES["tree"], 6, 256, True)
    times = engine.step_times(repeats=1)
    assert list(times) == [1, 2, 4, 6]
    assert all(list(row) == [1, 2, 3, 5, 9] for row in times.values())
    assert min(seconds for row in times.values() for seconds in row.values()) > 0


@pytest.mark.parametrize("lags", [False, True])
def test_captured_hidden_states_are_those_of_a_plain_forward(tiny_base, prompts, plain_replies, lags):
    engine = engine_of(tiny_base, TREES["tree"], max_batch_size=4, lags=lags)
    engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
    done = engine.generate(prompts, max_new_tokens=40, capture_hidden=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for prompt, completion in zip(prompts, done, strict=True):
        with torch.inference_mode():
            hidden_TC = model.model(torch.tensor([prompt + completion.token_ids[:-1]])).last_hidden_state[0]
        assert completion.hidden_TC.shape == (len(completion.token_ids), 32)
        torch.testing.assert_close(completion.hidden_TC, hidden_TC[len(prompt) - 1 :], atol=1e-4, rtol=0)


def test_eos_and_the_limit_cut_inside_an_accepted_run(tiny_base, prompts, plain_replies):
    """An EOS that is an accepted guess must end the reply there, although the walk goes on behind it."""
    reply = plain_replies[0]
    for cut in range(1, 12):
        engine = engine_of(tiny_base, TREES["chain"], lags=cut % 2 == 0)
        engine.heads.skill, engine.heads.replies = 1.0, {tuple(prompts[0]): reply}
        assert engine.generate([prompts[0]], max_new_tokens=cut)[0].token_ids == reply[:cut]
        stop = Request(prompts[0], max_new_tokens=40, stop_ids=(reply[cut],))
        sequence = engine.add(stop)
        while not sequence.finish_reason:
            engine.step()
        assert sequence.finish_reason == "stop"
        assert sequence.token_ids == reply[: reply.index(reply[cut]) + 1]


@pytest.mark.parametrize("lags", [False, True])
def test_a_stream_gives_one_delta_a_step_and_leaving_it_frees_its_pages(tiny_base, prompts, lags):
    engine = engine_of(tiny_base, max_batch_size=3, lags=lags)
    free = engine.cache.num_free_pages

    async def read(prompt: list[int], limit: int) -> list[int]:
        tokens: list[int] = []
        stream = engine.stream(Request(prompt, max_new_tokens=60, ignore_eos=True))
        async for delta in stream:
            assert len(delta.token_ids) == 1
            tokens += delta.token_ids
            if len(tokens) == limit:
                break
        await stream.aclose()
        return tokens

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(read(p, 5 if i % 2 else 60) for i, p in enumerate(prompts)))

    replies = asyncio.run(main())
    assert [len(r) for r in replies] == [5 if i % 2 else 60 for i in range(len(prompts))]
    for _ in range(200):
        if engine.cache.num_free_pages == free:
            break
        asyncio.run(asyncio.sleep(0.01))
    assert engine.cache.num_free_pages == free
    assert engine.num_running == engine.num_waiting == 0
    expected = engine_of(tiny_base).generate(prompts, max_new_tokens=60, ignore_eos=True)
    assert all(e.token_ids[: len(r)] == r for e, r in zip(expected, replies, strict=True))


@pytest.mark.parametrize("lags", [False, True])
def test_a_first_token_does_not_wait_for_the_step_after_it(tiny_base, prompts, monkeypatch, lags):
    """Handed over with the step's own tokens it still arrives, a step late: the slower the step, the later."""
    engine = engine_of(tiny_base, lags=lags)
    is_read, move_on = threading.Event(), engine._move_on

    def wait_then_move_on():
        assert is_read.wait(30)
        return move_on()

    monkeypatch.setattr(engine, "_move_on", wait_then_move_on)

    async def read() -> list[int]:
        tokens: list[int] = []
        async for delta in engine.stream(Request(prompts[0], max_new_tokens=5, ignore_eos=True)):
            tokens += delta.token_ids
            is_read.set()
        return tokens

    assert len(asyncio.run(asyncio.wait_for(read(), 20))) == 5


def test_what_the_thread_says_at_once_reaches_the_stream(tiny_base, prompts, monkeypatch):
    """A reader that is known only after its request is queued misses tokens, or waits for ever for the last one."""
    engine = engine_of(tiny_base)
    add = engine.scheduler.add

    async def read(num_tokens: int) -> list[int]:
        request = Request(prompts[0], max_new_tokens=num_tokens, ignore_eos=True)
        return [token async for delta in engine.stream(request) for token in delta.token_ids]

    def add_and_wait_for_its_end(sequence):
        add(sequence)
        while not sequence.finish_reason:
            time.sleep(0.001)

    asyncio.run(asyncio.wait_for(read(1), 20))  # starts the thread
    monkeypatch.setattr(engine.scheduler, "add", add_and_wait_for_its_end)
    assert len(asyncio.run(asyncio.wait_for(read(5), 20))) == 5


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "no tokens"),
        (Request([5] * 250, max_new_tokens=10), "together 260; the limit is 256"),
        (Request([5] * 300, max_new_tokens=1), "together 301; the limit is 256"),
        (Request([5], max_new_tokens=0), "max_new_tokens is 0; expected a whole number, at least 1"),
        (Request([5], max_new_tokens=-3), "max_new_tokens is -3; .* at least 1"),
        (Request([5], max_new_tokens=2.5), "max_new_tokens is 2.5; .* at least 1"),
        (Request([5], max_new_tokens=True), "max_new_tokens is True"),
        (Request([5, 262]), "the prompt has the token id 262, outside 0 ... 261"),
        (Request([5, -1]), "token id -1, outside 0 ... 261"),
        (Request([5, 6.0]), "token id 6.0, outside"),
        (Request([5, True]), "token id True, outside"),
        (Request([5, "6"]), "token id '6', outside"),
        (Request([5, float("nan")]), "token id nan, outside"),
        (Request((5, 6)), "the prompt is of type tuple; expected a list"),
        (Request([5], stop_ids=(7, 1.5)), "stop_ids have the token id 1.5, outside 0 ... 261"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(tiny_base, request_, message):
    """A token that is no whole number would end the engine in the middle of a step, and everybody's replies with it."""
    engine = engine_of(tiny_base)
    with pytest.raises(ValueError, match=message):
        engine.add(request_)
    assert engine.scheduler.num_open == 0


def test_heads_of_another_base_and_trees_without_heads_are_refused(tiny_base):
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    with pytest.raises(ValueError, match="hidden size of 64, but the base has 32"):
        Engine(backbone, OracleHeads(64, 262), Tree.chain(3))
    with pytest.raises(ValueError, match="needs heads"):
        Engine(backbone, None, Tree.chain(3))
    with pytest.raises(ValueError, match="4 deep, but there are only 3 heads"):
        Engine(backbone, OracleHeads(32, 262), Tree.chain(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0; expected a whole number, at least 1"),
        ({"max_batch_size": -2}, "max_batch_size is -2; .* at least 1"),
        ({"max_batch_size": 1.5}, "max_batch_size is 1.5"),
        ({"max_batch_size": True}, "max_batch_size is True"),
        ({"max_total_tokens": 1}, "max_total_tokens is 1; expected a whole number, at least 2"),
        ({"max_total_tokens": -256}, "max_total_tokens is -256"),
        ({"max_waiting": -1}, "max_waiting is -1; expected a whole number, at least 0"),
        ({"tree": Tree.chain(4)}, "the tree is 4 deep, but there are only 3 heads"),
        ({"tree": Tree(((0,), (1, 0)))}, r"\(1, 0\) has no parent"),
        ({"tree": Tree(((0,), (0,)))}, r"\(0,\) comes twice"),
        ({"tree": Tree(((0, 0), (0,)))}, "children before their parents"),
        ({"tree": Tree(((-1,),))}, r"\(-1,\) is not a rank path"),
        ({"tree": Tree(((262,),))}, "rank 262, counted from 0, but the heads guess only 262"),
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_taken(tiny_base, monkeypatch, options, message):
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    monkeypatch.setattr("medusa_ray.medusa.engine.PagedCache", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=message):
        Engine(backbone, OracleHeads(32, 262), **options)


def test_counts_are_looked_at_before_the_base_is_loaded():
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        Engine.load("no/such/folder", max_batch_size=0)


@pytest.mark.parametrize("tree", [5, [5], [[0], [[1]]], [[0], None], "[[0]]", [["0"]], {"paths": [[0]]}])
def test_a_tree_that_is_none_is_refused(tiny_base, tree):
    heads = MedusaHeads(hidden_size=32, vocab_size=262)
    with pytest.raises(ValueError, match=r"rank path|tree is"):
        Engine.load(str(tiny_base), heads, tree=tree)
