"""Steps as graphs: the same replies, whatever lies in a graph's memory between two replays.

Here a graph is a recording of a pass's operations, which are repeated into the same memory while Python does not run,
as a GPU repeats them. What is marked `gpu` captures real graphs.
"""

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_heads import OracleHeads
from test_architectures import build as model_of
from test_engine_sampling import TREES, accepted_per_step, mixed_requests, prompts_of, run
from test_kernels import interpreted as interpreted  # a fixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medusa_ray.medusa import attention, compiled, graphs, reference
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import NULL_PAGE, PAGE_SIZE, PagedCache
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.graphs import GraphedPass
from medusa_ray.medusa.scheduler import Request
from medusa_ray.medusa.sizing import doublings
from medusa_ray.medusa.tree import Tree
from medusa_ray.medusa.treepass import Outcome, TreePass

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal"}  # for what the device has computed


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recording(TorchDispatchMode):
    """Operations in their order, with what they read and where their results lie."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        read = set(map(memory_of, tensors_of((args, kwargs))))
        fresh = [None if memory_of(t) in read else t for t in tensors_of(result)]  # else a view, or in place
        self.operations.append((func, args, kwargs or {}, fresh))
        return result

    def repeat(self) -> None:
        for func, args, kwargs, fresh in self.operations:
            for mine, new in zip(fresh, tensors_of(func(*args, **kwargs)), strict=True):
                if mine is not None:
                    mine.copy_(new)

    def spoil(self) -> None:
        """What graphs that share the memory may leave in it."""
        for *_, fresh in self.operations:
            for mine in fresh:
                if mine is not None:
                    mine.fill_(
                        torch.nan if mine.is_floating_point() else True if mine.dtype == torch.bool else 2**40
                    )


@dataclass
class Recorder:
    """Captures on a CPU. Every replay first spoils all that the others, and its own last one, have left."""

    recordings: list[Recording] = field(default_factory=list)
    num_replays: int = 0
    num_good: int | None = None  # captures before they fail

    def __call__(self, run: graphs.Run) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        if len(self.recordings) == self.num_good:
            raise RuntimeError("out of memory")
        run()  # as before a capture
        recording = Recording()
        with recording:
            outputs = run()
        self.recordings.append(recording)
        recording.spoil()
        return outputs, partial(self.replay, recording)

    @torch.inference_mode()
    def replay(self, recording: Recording) -> None:
        self.num_replays += 1
        for one in self.recordings:
            one.spoil()
        recording.repeat()


def replaying(engine: Engine, rows: list[int] | None = None, forward: Any = None) -> tuple[Engine, Recorder]:
    """The engine, whose decoding is replayed; that it runs eagerly what fits is an error."""
    eager, recorder = engine._pass, Recorder()
    rows = rows or doublings(engine.scheduler.max_batch_size)

    def only_the_rest(token_BN: Tensor, *others: Any) -> tuple[Tensor, ...]:
        assert others[4].shape != token_BN.shape or len(token_BN) > rows[-1], "a step ran eagerly"
        return eager(token_BN, *others)

    width = PagedCache.pages_for(engine.max_total_tokens + engine.scheduler.num_slack)
    engine._pass = GraphedPass(
        eager if forward is None else forward, only_the_rest, rows, width, lambda: recorder
    )
    return engine, recorder


@pytest.fixture
def engine_of(tiny_base: Path) -> Callable[..., Engine]:
    def build(tree: str | None = None, **options: Any) -> Engine:
        backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
        heads: Any = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
        options = {"max_total_tokens": 128, "max_batch_size": 6, **options}
        engine = Engine(backbone, heads, TREES.get(tree), **options)
        if heads:
            heads.engine = engine
        return engine

    return build


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("tree", [None, "chain", "tree"])
def test_greedy_replies_equal_those_of_generate(engine_of, prompts, plain_replies, tree, batch_size):
    engine, recorder = replaying(engine_of(tree, max_batch_size=batch_size, max_total_tokens=256))
    if tree:
        engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies
    assert len(recorder.recordings) <= len(doublings(batch_size)), "a graph is captured once"
    assert recorder.num_replays > 5 * len(recorder.recordings)


@pytest.mark.parametrize(("tree", "lags"), [(None, False), ("tree", False), ("tree", True)])
def test_replies_of_mixed_requests_that_come_and_go_are_the_eager_ones(engine_of, tree, lags):
    """Sampled, penalised, masked and plain ones share batches of changing size, and trees change from step to step."""
    requests = mixed_requests(0.8, 50) + [Request(prompt, 12) for prompt in prompts_of(20, seed=5)]
    requests += [Request([token], 12) for token in range(20, 28)]  # whose prompts are steps of one node
    random.Random(1).shuffle(requests)
    alone = [s.token_ids for s in run(engine_of(), requests)]
    engine, recorder = replaying(engine_of(tree, is_adaptive=tree is not None, lags=lags))
    rng = random.Random(0)
    if tree:
        engine._pick_tree = lambda: rng.choice(list(engine.trees.values()))  # type: ignore[method-assign]
    sequences = run(engine, requests, alone)
    assert [s.token_ids for s in sequences] == alone
    assert recorder.num_replays > 80
    assert tree is None or accepted_per_step(sequences) > 1.2


def test_greedy_replies_outlive_the_one_token_prompts_that_join_them(engine_of):
    """Such a prompt is replayed by the graph that holds what the running ones' next step starts from."""
    prompts = [[1, 7, 9, 30], *([token] for token in range(40, 45))]
    expected = [d.token_ids for d in engine_of(shares_prefixes=False).generate(prompts, 12)]
    engine, _ = replaying(engine_of(shares_prefixes=False))
    sequences = []
    for prompt in prompts:
        sequences.append(engine.add(Request(prompt, 12)))
        engine.step()
    while not all(s.finish_reason for s in sequences):
        engine.step()
    assert [s.token_ids for s in sequences] == expected


@pytest.mark.parametrize("lags", [False, True])
def test_hidden_states_that_are_kept_are_those_of_their_step(engine_of, prompts, plain_replies, lags):
    outcomes = []
    for engine in (
        engine_of("tree", max_total_tokens=256),
        replaying(engine_of("tree", max_total_tokens=256, lags=lags))[0],
    ):
        engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
        outcomes.append(engine.generate(prompts, 20, capture_hidden=True))
    for eager, graphed in zip(*outcomes, strict=True):
        assert graphed.token_ids == eager.token_ids
        torch.testing.assert_close(graphed.hidden_TC, eager.hidden_TC, rtol=1e-4, atol=1e-4)


def test_batches_with_more_rows_than_any_graph_run_eagerly(engine_of, prompts, plain_replies):
    engine, recorder = replaying(engine_of(max_batch_size=5, max_total_tokens=256), rows=[1, 2])
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies
    assert recorder.num_replays, "the last ones run alone"


def step_of(engine: Engine, pages: list[int], length: int, tree: Tree, keys: Any = None) -> Outcome:
    """A step of the engine's pass, a page a row, on tokens that tell rows and nodes apart."""
    token_BN = torch.arange(len(pages) * len(tree)).view(len(pages), -1) + 7
    every_BN = torch.arange(len(tree)).repeat(len(pages), 1)
    table_BP, length_B = torch.tensor(pages)[:, None], torch.full((len(pages),), length)
    tensors = token_BN, length_B, table_BP, *tree.shape[:2], every_BN, *tree.shape, torch.tensor(True)
    with torch.inference_mode():
        return Outcome(*engine._pass(*tensors, keys or engine.cache.keys, engine.cache.values))


def test_rows_that_are_wanting_write_to_the_null_page_alone(engine_of):
    """A row left from the step before would write over what its pages hold by now, another sequence's maybe."""
    engine, recorder = replaying(engine_of(), rows=[4])
    step_of(engine, [1, 2, 3, 4], 5, TREES["tree"])
    before = [pool.clone() for pool in engine.cache.keys]
    step_of(engine, [7], 9, TREES["tree"])
    for pool, old in zip(engine.cache.keys, before, strict=True):
        changed = (pool != old).flatten(1).any(1).nonzero().flatten() // PAGE_SIZE
        assert set(changed.tolist()) <= {7, NULL_PAGE}
        assert 7 in changed
    assert len(recorder.recordings) == 1
    (graph,) = engine._pass._graphs.values()
    assert graph.length_B.tolist() == [9, 0, 0, 0], (
        "reading an old length of null pages would take as long as ever"
    )


def test_what_a_call_returns_is_its_own_but_for_logits_and_hidden_states(engine_of):
    """Also, that what lies in a graph's memory is spoilt here: else these tests would show nothing."""
    engine, _ = replaying(engine_of())
    first = step_of(engine, [1, 2, 3], 5, TREES["tree"])
    kept = Outcome(*(tensor.clone() for tensor in first))
    assert not kept.logits_BWV.isnan().any()
    step_of(engine, [4], 0, TREES["chain"])
    for name in ("verdict_BX", "root_B", "hidden_BC", "length_B"):
        assert getattr(first, name).equal(getattr(kept, name)), name
    assert first.logits_BWV.isnan().all()
    assert first.hidden_BWC.isnan().all()


def test_two_trees_of_one_shape_share_a_graph(engine_of):
    wide, deep = Tree.from_paths([(0,), (1,), (0, 0)]), Tree.from_paths([(0,), (1,), (1, 0)])
    eager, (engine, recorder) = engine_of(), replaying(engine_of())
    for tree in (wide, deep, wide):
        expected, got = (step_of(e, [1, 2], 5, tree) for e in (eager, engine))
        torch.testing.assert_close(got, expected)
    assert len(recorder.recordings) == 1


def test_graphs_of_other_pools_are_forgotten(engine_of):
    """The check before adoption has pools of its own: their addresses are in its graphs."""
    eager, (engine, recorder) = engine_of(), replaying(engine_of())
    step_of(engine, [1], 3, TREES["tree"], [pool.clone() for pool in engine.cache.keys])
    for e in (eager, engine):
        for pool in (*e.cache.keys, *e.cache.values):
            pool.copy_(torch.linspace(-1, 1, pool.numel()).view_as(pool))
    expected, got = (step_of(e, [1], 3, TREES["tree"]) for e in (eager, engine))
    torch.testing.assert_close(got, expected)
    assert len(recorder.recordings) == 2


# ------------------------------------------------------------------------------------------ what may be captured


class NoHost(TorchDispatchMode):
    """Refuses operations that would stop a capture: those that wait, and those that bring tensors from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITS, func
        result = func(*args, **(kwargs or {}))
        assert {t.device.type for t in tensors_of(result)} <= {"meta"}, f"{func} gives a tensor of the host"
        given = [t for t in tensors_of((args, kwargs)) if t.device.type == "cpu"]
        assert not given, f"{func} reads a tensor of the host"
        return result


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
def test_a_step_over_a_tree_neither_waits_for_the_device_nor_brings_anything_to_it(monkeypatch, model_type):
    """On the device "meta", which has no numbers to read, with the kernel's shapes alone."""
    pytest.importorskip("triton")
    backbone = Backbone(model_of(model_type))
    pools = [
        pool.to("meta") for pool in PagedCache(backbone.kv_shapes, 2, torch.float32, backbone.device).keys
    ]
    backbone.model.to("meta")
    monkeypatch.setattr(attention, "IS_INTERPRETED", True)
    tree = TREES["tree"].to("meta")
    ids = partial(torch.zeros, dtype=torch.long, device="meta")
    is_greedy = torch.tensor(True, device="meta")
    tensors = ids(2, len(tree)), ids(2), ids(2, 3), *tree.shape[:2], ids(2, len(tree)), *tree.shape, is_greedy
    with torch.inference_mode(), NoHost():
        logits_BNV, *_ = TreePass(backbone)(*tensors, pools, pools)
    assert logits_BNV.shape == (2, len(tree), backbone.vocab_size)


def test_a_capture_that_waits_for_the_device_fails_here_as_it_does_there(engine_of):
    eager = engine_of()._pass

    def curious(token_BN: Tensor, length_B: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        assert length_B.max().item() < 10**6
        return eager(token_BN, length_B, *rest)

    engine, _ = replaying(engine_of())
    engine._pass._forward = engine._pass._eager = curious
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        step_of(engine, [1], 3, TREES["tree"])


def replies_by_kernel(base: Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Of an engine with graphs and of transformers' generate."""
    backbone = Backbone.load(str(base), torch.float32, "cpu")
    assert attention.takes_kernel(backbone.device, 9)
    expected = reference.generate(backbone.model, prompts, 8, batch_size=1)
    heads: Any = OracleHeads(backbone.hidden_size, backbone.vocab_size)
    engine, recorder = replaying(
        Engine(backbone, heads, TREES["tree"], max_batch_size=3, max_total_tokens=256), [4]
    )
    heads.engine, heads.replies = engine, {tuple(p): r for p, r in zip(prompts, expected, strict=True)}
    ours = [d.token_ids for d in engine.generate(prompts, max_new_tokens=8)]
    assert recorder.num_replays
    return [ours, expected]


@pytest.mark.long
def test_the_kernel_reads_no_further_than_sequences_are_long(interpreted, tiny_base):
    """In page tables of full width, with a row of the null page."""
    ours, expected = interpreted(replies_by_kernel, tiny_base, [[1, *range(20, 20 + n)] for n in (3, 62, 90)])
    assert ours == expected


@pytest.mark.long
def test_torch_compiles_one_forward_for_all_graphs_but_those_of_a_single_row_or_node(engine_of):
    """Sizes that happen to be alike, rows and nodes or rows and heads, must not be taken for the same one."""
    num_compiled = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal num_compiled
        num_compiled += 1
        return graph

    def run_again(run: graphs.Run) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        outputs = run()

        def replay() -> None:
            for mine, new in zip(outputs, run(), strict=True):
                mine.copy_(new)

        return outputs, replay

    torch._dynamo.reset()
    eager, engine = engine_of(), engine_of()
    engine, _ = replaying(engine, forward=torch.compile(engine._pass, fullgraph=True, backend=count))
    engine._pass._new_capture = lambda: run_again  # torch compiles nothing that is being recorded
    for rows in (2, 4, 1, 6):
        for tree in (TREES["tree"], Tree.chain(1), Tree.chain(3), Tree()):
            expected, got = (step_of(e, [*range(1, rows + 1)], 3, tree) for e in (eager, engine))
            torch.testing.assert_close(got, expected)
    assert num_compiled == 4
    with torch.inference_mode():  # on pools of another size
        assert compiled.difference(engine._pass, eager._pass, eager.backbone) < 1e-5
    assert num_compiled == 4


# ------------------------------------------------------------------------------------------ adoption


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("medusa_ray"), "propagate", True)
    return caplog


def adopting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, recorder: Recorder, forward: Any = None
) -> None:
    """Has the engine build graphs, as if it stood on a GPU."""
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: recorder)
    monkeypatch.setattr(torch, "compile", lambda eager, fullgraph: forward or eager)
    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    monkeypatch.setattr(compiled, "load_or_build", lambda *_: engine._graphed())
    engine.compile("base", "float32")


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_all_that_steps_replay_is_captured_before_the_first_request(
    engine_of, prompts, plain_replies, monkeypatch, is_adaptive
):
    engine, recorder = engine_of("tree", max_total_tokens=256, is_adaptive=is_adaptive), Recorder()
    engine.heads.topk = lambda hidden_BC, k: torch.zeros(len(hidden_BC), 3, k, dtype=torch.long)
    adopting(engine, monkeypatch, recorder)
    assert engine.mode == "graphs"
    if is_adaptive:
        engine.measure()
    num_captured = len(recorder.recordings)
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies
    mixed = engine.generate(prompts, max_new_tokens=40, speculates=False)
    assert [d.token_ids for d in mixed] == plain_replies
    assert len(recorder.recordings) == num_captured
    assert recorder.num_replays > num_captured


def test_a_forward_that_does_not_compile_is_captured_as_it_is(
    engine_of, prompts, plain_replies, monkeypatch, said
):
    def fail(*_: Any) -> tuple[Tensor, ...]:
        raise RuntimeError("sizes on strike")

    engine = engine_of(max_total_tokens=256)
    adopting(engine, monkeypatch, Recorder(), fail)
    assert engine.mode == "graphs"
    assert said.text.count("the base is not compiled, for that fails: sizes on strike") == 1
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies


@pytest.mark.parametrize("num_good", [0, 3])
def test_an_engine_whose_capture_fails_runs_eagerly_and_says_why(
    engine_of, prompts, plain_replies, monkeypatch, said, num_good
):
    """At the first one, or when memory runs out in the middle."""
    engine = engine_of(max_total_tokens=256)
    adopting(engine, monkeypatch, Recorder(num_good=num_good))
    assert engine.mode == "eager"
    assert "the engine runs eagerly: out of memory" in said.text
    assert [d.token_ids for d in engine.generate(prompts[:3], max_new_tokens=40)] == plain_replies[:3]


def test_a_graph_that_says_something_else_is_not_taken(engine_of, monkeypatch, said):
    engine = engine_of(max_total_tokens=256)
    eager = engine._pass
    adopting(
        engine, monkeypatch, Recorder(), lambda t, n, table_BP, *rest: eager(t, n, table_BP.flip(0), *rest)
    )
    assert engine.mode == "eager"
    assert "the compiled pass of LlamaForCausalLM differs from the eager one by" in said.text


def test_without_a_c_compiler_the_forward_is_captured_as_it_is(engine_of, monkeypatch, said):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    engine = engine_of(max_total_tokens=256)
    adopting(engine, monkeypatch, Recorder(), lambda *_: pytest.fail("compiled"))
    assert engine.mode == "graphs"
    assert "the base is not compiled: there is no C compiler, gcc and no clang" in said.text


def test_an_engine_on_a_gpu_builds_graphs(engine_of, monkeypatch):
    engine = engine_of("chain")
    monkeypatch.setattr(engine, "backbone", SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(graphs, "why_not", lambda device: None)
    monkeypatch.setattr(graphs, "build", lambda *arguments: arguments)
    engine._build("base", "float32", None)
    assert engine._built == (engine.backbone, [1, 2, 4, 6], PagedCache.pages_for(128 + 4))


def test_without_the_kernel_there_are_no_graphs(monkeypatch):
    monkeypatch.setattr(attention, "is_kernel_trusted", False)
    assert "without the GPU's own kernel" in graphs.why_not("cuda")


# ------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tree", [None, "chain", "tree"])
def test_graphs_on_a_gpu_give_the_eager_replies(tiny_base, tree):
    requests = mixed_requests(0.8, 30) + [Request(prompt, 12) for prompt in prompts_of(20, seed=5)]
    requests += [Request([token], 12) for token in range(20, 28)]
    outcomes: list[list[list[int]]] = []
    for compile in ("no", "wait"):
        loaded = Engine.load(
            str(tiny_base), device="cuda", compile=compile, max_batch_size=6, max_total_tokens=128
        )
        backbone = loaded.backbone
        heads: Any = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
        engine = Engine(backbone, heads, TREES.get(tree), max_batch_size=6, max_total_tokens=128)
        if heads:
            heads.engine = engine
            # As many captured as steps need, before the heads know any reply.
            heads.replies = {}
            propose, heads.topk = (
                heads.topk,
                lambda h, k: torch.zeros(len(h), 3, k, dtype=torch.long, device="cuda"),
            )
        if compile == "wait":
            assert loaded.mode == "graphs"
            engine.compile(str(tiny_base), "float32")
            assert engine.mode == "graphs"
        if heads:
            heads.topk = propose
        outcomes.append(
            [s.token_ids for s in run(engine, requests, outcomes[0] if outcomes else [[]] * len(requests))]
        )
    assert outcomes[0] == outcomes[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_of_a_forward_compiled_for_a_gpu_say_what_the_eager_pass_says(tiny_base, dtype):
    engine = Engine.load(str(tiny_base), device="cuda", dtype=dtype, compile="wait", max_total_tokens=256)
    assert engine.mode == "graphs"
    assert engine._pass._forward is not engine._pass._eager, "compiling failed"
    with torch.inference_mode():
        apart = compiled.difference(engine._pass, TreePass(engine.backbone), engine.backbone)
    assert apart <= compiled.TOLERANCE[engine.backbone.dtype]
