"""Other heads, another tree or none, while requests run: no reply is lost, cut or changed by it."""

import asyncio
import random
import threading
from pathlib import Path

import pytest
import torch
from fake_heads import OracleHeads

from medusa_ray.medusa import guesser
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PAGE_SIZE
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.tree import MAX_GUESSES, Tree

SMALL, CHAIN = Tree.from_paths([(0,), (1,)]), Tree.chain(3)
BUSHY = Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1)])
LARGE = Tree.from_paths([(i,) for i in range(8)] + [(i, k) for i in range(8) for k in range(8)])


@pytest.fixture(scope="module")
def backbone(tiny_base: Path) -> Backbone:
    return Backbone.load(str(tiny_base), torch.float32, "cpu")


@pytest.fixture
def oracle(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> OracleHeads:
    """Heads that make trees deep; `swap` takes them as they are."""
    monkeypatch.setattr(guesser, "load", lambda _, heads, tree: (heads, tree))
    return OracleHeads(backbone.hidden_size, backbone.vocab_size, skill=0.8)


def heads_of(backbone: Backbone, num_heads: int = 3, **options) -> MedusaHeads:
    torch.manual_seed(num_heads)
    sizes = {"hidden_size": backbone.hidden_size, "vocab_size": backbone.vocab_size, **options}
    return MedusaHeads(num_heads, 1, **sizes)


def requests_of(num: int, seed: int) -> list[Request]:
    """All manner of them. Every third one fills its last page to the slot before the last."""
    rng, requests = random.Random(seed), []
    for i in range(num):
        prompt, num_new = (
            [1, *(rng.randrange(6, 262) for _ in range(rng.randrange(1, 90)))],
            rng.randrange(1, 60),
        )
        if i % 3 == 0:
            num_new = PAGE_SIZE - (len(prompt) + 3) % PAGE_SIZE
        penalties = {"frequency_penalty": 0.5} if i % 5 == 1 else {}
        settings = {"temperature": rng.choice([0, 0, 0.8]), "speculates": i % 7 != 3, **penalties}
        requests.append(Request(prompt, num_new, seed=i, ignore_eos=True, **settings))
    return requests


Known = list[tuple[Request, list[int]]]


@pytest.fixture(scope="module")
def all_known(backbone: Backbone) -> Known:
    """Requests and what the base alone says to them."""
    requests, engine = requests_of(40, seed=1), Engine(backbone, max_batch_size=8, max_total_tokens=256)
    sequences = [engine.add(request) for request in requests]
    while engine.scheduler.num_open:
        engine.step()
    return [(request, sequence.token_ids) for request, sequence in zip(requests, sequences, strict=True)]


@pytest.fixture(params=[False, True], ids=["read at once", "read a step later"])
def lags(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def known(all_known: Known, lags: bool) -> Known:
    """All of them, but where steps are read later those alone that let them be."""
    return [(request, reply) for request, reply in all_known if not (lags and request.is_penalised)]


@pytest.mark.parametrize("seed", range(4))
def test_replies_are_the_bases_whatever_is_swapped_in_the_middle(
    backbone: Backbone, oracle: OracleHeads, known: Known, lags: bool, seed: int
) -> None:
    """A tree that writes behind the pages of a row that joined before it would spoil that row's last tokens alone."""
    rng = random.Random(seed)
    engine = Engine(backbone, max_batch_size=6, max_total_tokens=256, lags=lags)
    oracle.engine, oracle.replies = engine, {tuple(request.prompt_ids): reply for request, reply in known}
    coming, sequences, seen = rng.sample(known, len(known)), [], set()
    while coming or engine.scheduler.num_open:
        if coming and rng.random() < 0.4:
            request, reply = coming.pop()
            sequences.append((engine.add(request), reply))
        if sequences and rng.random() < 0.03:
            engine.cancel(rng.choice(sequences)[0])
        if rng.random() < 0.25:
            tree = rng.choice([None, SMALL, CHAIN, BUSHY, LARGE])
            engine.swap(oracle if tree else None, tree)
            assert (engine.num_heads, engine.tree.paths) == ((3, tree.paths) if tree else (0, ()))
        engine.step()
        seen.add(len(engine._unread[-1].tree) if engine._unread else 0)
    for sequence, reply in sequences:
        whole = sequence.finish_reason != "cancelled"
        assert sequence.token_ids == (reply if whole else reply[: len(sequence.token_ids)])
    assert engine.counters.num_accepted_tokens > 100
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_a_larger_tree_is_cut_for_rows_that_have_no_pages_for_it(
    backbone: Backbone, oracle: OracleHeads
) -> None:
    """And for these alone, in their last steps."""
    prompt, num_new = [1, 7, 8], 2 * PAGE_SIZE - 4  # one slot is left over
    plain = Engine(backbone).generate([prompt], num_new, ignore_eos=True)[0].token_ids
    engine = Engine(backbone, max_batch_size=2, max_total_tokens=256)
    oracle.engine, oracle.replies, oracle.skill = engine, {tuple(prompt): plain}, 0.0
    nodes: list[int] = []
    for _ in range(2):
        sequence = engine.add(Request(prompt, num_new, ignore_eos=True))
        engine.step()
        engine.swap(oracle, LARGE)
        nodes.append(0)
        while not sequence.finish_reason:
            before = engine.counters.num_draft_tokens
            engine.step()
            nodes[-1] += engine.counters.num_draft_tokens > before
        assert sequence.token_ids == plain
        assert len(sequence.pages) == [2, 4][len(nodes) - 1]
    with_guesses, all_steps = nodes
    assert all_steps == num_new - 2  # the prefill's token and the first step's came before the swap
    assert 40 <= with_guesses < all_steps - 60


@pytest.mark.parametrize("num_prompt", range(1, 5))
def test_a_tree_that_fits_leaves_room_for_the_root_of_a_step_that_comes_before_it_is_read(
    backbone: Backbone, oracle: OracleHeads, num_prompt: int
) -> None:
    prompt, num_new = [*range(1, num_prompt + 1)], 2 * PAGE_SIZE - 2 - num_prompt
    # More than is asked for: the step that ends the reply is to reach behind it.
    plain = Engine(backbone).generate([prompt], num_new + 10, ignore_eos=True)[0].token_ids
    engine = Engine(backbone, max_batch_size=2, max_total_tokens=126, lags=True)
    oracle.engine, oracle.replies, oracle.skill = engine, {tuple(prompt): plain}, 1.0
    sequence = engine.add(Request(prompt, num_new, ignore_eos=True))
    engine.step()
    engine.swap(oracle, CHAIN)
    while not sequence.finish_reason:
        engine.step()
    assert sequence.token_ids == plain[:num_new]
    assert len(sequence.pages) == 2


def test_heads_that_do_not_fit_are_refused_and_the_old_ones_stay(backbone: Backbone, tmp_path: Path) -> None:
    engine = Engine(backbone, heads_of(backbone), BUSHY, max_batch_size=1, max_total_tokens=60)
    before = engine.generate([[1, 7]], 20)[0].num_steps
    for heads, tree, says in (
        (heads_of(backbone, hidden_size=16), None, "hidden size of 16, but the base has 32"),
        (heads_of(backbone, vocab_size=99), None, "vocabulary of 99, but the base has 262"),
        (heads_of(backbone, 2), BUSHY, "3 deep, but there are only 2 heads"),
        (
            heads_of(backbone, 1),
            Tree.from_paths([(i,) for i in range(MAX_GUESSES)]),
            "take more than the 128 tokens",
        ),
        (None, CHAIN, "needs heads"),
        (tmp_path / "none", None, "none"),
    ):
        with pytest.raises((ValueError, OSError), match=says):
            engine.swap(heads, tree)
        assert (engine.tree.paths, engine.num_heads) == (BUSHY.paths, 3)
    assert engine.generate([[1, 7]], 20)[0].num_steps == before


def test_counters_go_on_over_a_deeper_tree(backbone: Backbone, oracle: OracleHeads) -> None:
    engine = Engine(backbone)
    plain = engine.generate([[1, 7]], 30, ignore_eos=True)[0].token_ids
    oracle.engine, oracle.replies, oracle.skill = engine, {(1, 7): plain}, 1.0
    for heads, tree, places in ((oracle, SMALL, 1), (oracle, CHAIN, 3), (None, None, 3)):
        engine.swap(heads, tree)
        engine.generate([[1, 7]], 30, ignore_eos=True)
        assert len(engine.counters.num_accepted_tokens_per_pos) == places
    assert engine.counters.num_accepted_tokens == sum(engine.counters.num_accepted_tokens_per_pos)
    assert engine.counters.num_generated_tokens == 4 * 30


def test_swaps_beside_the_engines_thread_disturb_no_stream(
    backbone: Backbone, known: Known, lags: bool
) -> None:
    """Adaptive trees are measured anew, which takes hundreds of passes: no more than two come between two steps."""
    engine = Engine(backbone, max_batch_size=8, max_total_tokens=256, lags=lags)
    longest, timed = 0, 0
    time_pass, move_on = engine._time, engine._move_on

    def count_timed(*args):
        nonlocal timed
        timed += 1
        return time_pass(*args)

    def count_moved():
        nonlocal longest, timed
        longest, timed = max(longest, timed if engine._batch else 0), 0
        return move_on()

    engine._time, engine._move_on = count_timed, count_moved  # type: ignore[method-assign]

    async def reply_of(request: Request) -> list[int]:
        return [token async for delta in engine.stream(request) for token in delta.token_ids]

    swapped: list[int] = []

    def swap_all() -> None:
        for heads, tree in (
            (heads_of(backbone), "auto"),
            (None, None),
            (heads_of(backbone, 2), BUSHY.paths[:3]),
        ) * 2:
            engine.swap(heads, tree)
            swapped.append(engine.num_heads)

    async def run() -> None:
        engine.start()
        await asyncio.to_thread(engine.swap, heads_of(backbone, 1), "chain")  # while it sleeps
        assert engine.num_nodes == 1
        swapping = threading.Thread(target=swap_all)
        swapping.start()
        while swapping.is_alive():
            replies = await asyncio.gather(*(reply_of(request) for request, _ in known))
            assert replies == [reply for _, reply in known]
        swapping.join()

    asyncio.run(asyncio.wait_for(run(), 120))
    assert swapped == [3, 0, 2] * 2
    assert longest == 2
    assert engine.sizer is None


def test_heads_that_fail_while_they_are_measured_change_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(backbone, heads_of(backbone), CHAIN)
    bad = heads_of(backbone, 2)
    monkeypatch.setattr(bad, "stack", lambda: None)
    new = guesser.Guesser.of(backbone, bad, None, True)
    monkeypatch.setattr(guesser.Guesser, "of", lambda *_: new)
    monkeypatch.setattr(guesser.Guesser, "propose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.swap(bad, "auto")
    monkeypatch.undo()
    assert engine.num_heads == 3
    assert len(engine.generate([[1, 7]], 5, ignore_eos=True)[0].token_ids) == 5
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_a_failed_engine_says_so_to_whoever_swaps(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(backbone, heads_of(backbone))
    monkeypatch.setattr(engine, "_take_in", lambda: 1 / 0)
    engine.start()
    for _ in range(2):  # it fails while the first one waits
        with pytest.raises(RuntimeError, match="the engine has failed: division by zero"):
            engine.swap(None)
