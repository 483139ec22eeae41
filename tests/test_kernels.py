"""The Triton kernel, run by Triton's interpreter in a process of its own: its switch must be set before the import.

What is marked `gpu` runs the same cases compiled.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_heads import OracleHeads
from test_architectures import ARCHITECTURES, NEW_TOKENS, VOCAB, build, plain_reply, prompts
from torch import Tensor

from medusa_ray.medusa import attention, reference
from medusa_ray.medusa.attention import Step, TreeTables, attend
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import NULL_PAGE, PAGE_SIZE, KVShape, PagedCache, slots, write
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.tree import Tree, ancestor_bits
from medusa_ray.medusa.treepass import TreePass

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

KV_HEADS = 2
LAYER = SimpleNamespace(layer_idx=0)


@dataclass(frozen=True)
class Case:
    nodes: int
    groups: int
    head_size: int
    window: int | None = None
    softcap: float | None = None
    has_sink: bool = False
    splits: int | None = None  # None: as the shapes have it
    lengths: tuple[int, ...] = (0, 5, 63, 130)
    value_size: int | None = None  # None: as large as a key


CASES = [
    Case(nodes=1, groups=1, head_size=16),
    Case(nodes=1, groups=4, head_size=128, splits=3),
    Case(nodes=1, groups=8, head_size=64, window=20, splits=2, lengths=(0, 19, 20, 64, 200)),
    Case(nodes=3, groups=2, head_size=32, lengths=(0, 1, 61, 62, 63, 64, 127)),
    Case(nodes=3, groups=8, head_size=128, window=9, softcap=3.0, has_sink=True, splits=5),
    Case(nodes=7, groups=7, head_size=80, has_sink=True, splits=1),
    Case(nodes=5, groups=2, head_size=24, value_size=12, splits=2),
    Case(nodes=5, groups=2, head_size=16, value_size=40, has_sink=True),
    Case(nodes=16, groups=1, head_size=64, softcap=5.0),
    Case(nodes=16, groups=4, head_size=16, window=24, splits=4),
    Case(nodes=16, groups=4, head_size=128, lengths=(63, 64)),
    Case(nodes=26, groups=2, head_size=32, window=70, splits=6, lengths=(0, 45, 71, 190)),
    Case(nodes=26, groups=8, head_size=16, has_sink=True, splits=7, lengths=(2, 300)),
    Case(nodes=64, groups=1, head_size=96, window=5, splits=2, lengths=(0, 100)),
    Case(nodes=64, groups=4, head_size=16, splits=8, lengths=(0, 63, 500)),
    Case(nodes=64, groups=2, head_size=32, softcap=2.0, has_sink=True, lengths=(1, 150)),
]


@dataclass
class Problem:
    """Random inputs of a case: a tree, scattered pages full of leftovers, and contexts in them."""

    case: Case
    parents: list[int]
    cache: PagedCache
    table_BP: Tensor
    length_B: Tensor
    depth_T: Tensor
    query_BHTE: Tensor
    key_BKTE: Tensor
    value_BKTU: Tensor
    sink_H: Tensor | None

    @classmethod
    def of(cls, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Problem":
        generator = torch.Generator().manual_seed(case.nodes + case.head_size)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        B, T, H, E = len(case.lengths), case.nodes, KV_HEADS * case.groups, case.head_size
        U = case.value_size or E
        parents = [0, *(int(torch.randint(node, (1,), generator=generator)) for node in range(1, T))]
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        P = PagedCache.pages_for(max(case.lengths) + T)
        cache = PagedCache([KVShape(KV_HEADS, E, U)], B * P, dtype, torch.device(device))
        for pool in (*cache.keys, *cache.values):  # what a wrong slot gives is far from all that is right
            pool.copy_(30 * random(*pool.shape))
        table_BP = (1 + torch.randperm(B * P, generator=generator)).view(B, P).to(device)
        for row, length in enumerate(case.lengths):
            slot_1S = slots(table_BP[row : row + 1], torch.arange(length, device=device)[None])
            write(cache.keys[0], slot_1S, random(1, length, KV_HEADS, E))
            write(cache.values[0], slot_1S, random(1, length, KV_HEADS, U))
        return cls(
            case,
            parents,
            cache,
            table_BP,
            torch.tensor(case.lengths, device=device),
            torch.tensor(depths, device=device),
            random(B, H, T, E),
            random(B, KV_HEADS, T, E),
            random(B, KV_HEADS, T, U),
            random(H) if case.has_sink else None,
        )

    def sees(self, node: int, other: int) -> bool:
        return node == other or (node > 0 and self.sees(self.parents[node], other))

    @property
    def mask_TT(self) -> Tensor:
        node_T = range(self.case.nodes)
        return torch.tensor([[self.sees(node, other) for other in node_T] for node in node_T])

    @property
    def tables(self) -> TreeTables:
        return TreeTables(
            self.table_BP, self.length_B, self.depth_T, ancestor_bits(self.mask_TT).to(self.length_B)
        )

    def attend(self, step: Step) -> Tensor:
        case = self.case
        options: dict[str, Any] = {"scaling": 0.3, "sliding_window": case.window, "softcap": case.softcap}
        states = (self.query_BHTE, self.key_BKTE, self.value_BKTU)
        return attend(LAYER, *states, s_aux=self.sink_H, step=step, **options)[0]

    def by_kernel(self, tables: TreeTables | None = None, write_BT: Tensor | None = None) -> Tensor:
        from medusa_ray.medusa import kernels

        tables = tables or self.tables
        if write_BT is None:
            write_BT = self.write_BT
        position_BT = tables.length_B[:, None] + tables.depth_T
        step = Step(self.cache.keys, self.cache.values, write_BT, position_BT, tree=tables)
        splits = self.case.splits
        chosen = kernels.splits_for if splits is None else lambda *_: splits
        with mock.patch.object(kernels, "splits_for", chosen):
            return self.attend(step)

    @property
    def write_BT(self) -> Tensor:
        node_T = torch.arange(self.case.nodes, device=self.length_B.device)
        return slots(self.table_BP, self.length_B[:, None] + node_T)

    def by_dense_path(self) -> Tensor:
        with mock.patch.object(attention, "takes_kernel", return_value=False):
            step = attention.tree_step(
                self.length_B,
                self.table_BP,
                self.depth_T,
                self.mask_TT.to(self.length_B.device),
                self.cache.keys,
                self.cache.values,
            )
        return self.attend(step)

    def by_slow_loop(self) -> Tensor:
        """One query at a time, in float64."""
        case = self.case
        keys, values = self.cache.keys[0].double(), self.cache.values[0].double()
        out = values.new_zeros(*self.query_BHTE.transpose(1, 2).shape[:3], values.shape[2])
        for row, length in enumerate(case.lengths):
            for node in range(case.nodes):
                position = length + int(self.depth_T[node])
                seen = {slot: slot for slot in range(length)}  # slot of the sequence -> position
                for other in range(case.nodes):
                    if self.sees(node, other):
                        seen[length + other] = length + int(self.depth_T[other])
                near = [s for s, at in seen.items() if case.window is None or position - at < case.window]
                found = [int(self.table_BP[row, s // PAGE_SIZE]) * PAGE_SIZE + s % PAGE_SIZE for s in near]
                for head in range(KV_HEADS * case.groups):
                    query, kv_head = self.query_BHTE[row, head, node].double(), head // case.groups
                    scores = keys[found, kv_head] @ query * 0.3
                    if case.softcap is not None:
                        scores = case.softcap * torch.tanh(scores / case.softcap)
                    if self.sink_H is not None:
                        scores = torch.cat([scores, self.sink_H[head : head + 1].double()])
                    out[row, node, head] = scores.softmax(0)[: len(found)] @ values[found, kv_head]
        return out


def largest_difference(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    return (out.double() - expected).abs().max().item()


# ------------------------------------------------------------------------------------- by the interpreter


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in a process where Triton interprets its kernels."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # the process starts here, and keeps what it finds in its environment
        yield lambda function, *args: pool.submit(function, *args).result()


def differences(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    problem = Problem.of(case, dtype=dtype)
    kernel, dense, expected = problem.by_kernel(), problem.by_dense_path(), problem.by_slow_loop()
    return largest_difference(kernel, expected), largest_difference(dense, expected)


# Measured 1e-6 and 4e-6; 1e-3 and 4e-3. The interpreter has no bfloat16.
@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [*((case, torch.float32, 1e-5) for case in CASES), *((case, torch.float16, 1e-2) for case in CASES[3:7])],
    ids=str,
)
def test_the_kernel_and_the_dense_path_both_equal_a_slow_loop(interpreted, case, dtype, tolerance):
    """A wrong mask, page, window or merge of splits shifts the output a little, and acceptance with it."""
    by_kernel, by_dense_path = interpreted(differences, case, dtype)
    assert by_kernel < tolerance
    assert by_dense_path < tolerance


MUTATIONS: dict[str, Callable[[TreeTables], dict[str, Tensor]]] = {
    "one ancestor too many": lambda t: {"sees_T": t.sees_T | 2},
    "no ancestor but itself": lambda t: {"sees_T": 1 << torch.arange(len(t.sees_T))},
    "a token too few": lambda t: {"length_B": t.length_B - 1},
    "a token too many": lambda t: {"length_B": t.length_B + 1},
    "slots for positions": lambda t: {"depth_T": torch.arange(len(t.depth_T))},
    "pages in another order": lambda t: {"table_BP": t.table_BP.flip(1)},
}


def difference_under(case: Case, mutation: str) -> float:
    problem = Problem.of(case)
    wrong = replace(problem.tables, **MUTATIONS[mutation](problem.tables))
    return largest_difference(problem.by_kernel(wrong), problem.by_slow_loop())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_table_is_seen(interpreted, mutation):
    """Else the comparison above would prove nothing."""
    case = Case(nodes=16, groups=2, head_size=16, window=20, lengths=(70, 100))
    assert interpreted(difference_under, case, mutation) > 0.1


def rows_beside_padding(case: Case, length: int) -> tuple[Tensor, Tensor]:
    problem = Problem.of(case)
    return beside_padding(problem, problem.tables, length)


def beside_padding(problem: Problem, tables: TreeTables, length: int) -> tuple[Tensor, Tensor]:
    """What real rows get without and with a row of null pages behind them, which comes last."""
    alone, write_BT = problem.by_kernel(tables), problem.write_BT
    null_1P = torch.full_like(tables.table_BP[:1], NULL_PAGE)
    padded = replace(
        tables,
        table_BP=torch.cat([tables.table_BP, null_1P]),
        length_B=torch.cat([tables.length_B, torch.tensor([length])]),
    )
    for name in ("query_BHTE", "key_BKTE", "value_BKTU"):
        tensor = getattr(problem, name)
        setattr(problem, name, torch.cat([tensor, tensor[:1]]))
    write_BT = torch.cat([write_BT, torch.zeros_like(write_BT[:1])])
    return alone, problem.by_kernel(padded, write_BT)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("length", [0, 64, 10**6])
def test_a_row_of_null_pages_is_harmless_whatever_its_length(interpreted, length, splits, window):
    """A captured batch has idle rows, whose lengths nobody keeps; reading past the page table is a fault on a GPU."""
    case = Case(nodes=3, groups=2, head_size=16, window=window, splits=splits)
    alone, both = interpreted(rows_beside_padding, case, length)
    assert both[:-1].equal(alone)
    assert both[-1].isfinite().all()


def serve(architecture: str, device: str) -> Backbone:
    """A random base; loading it compares plain transformers with the engine's way, which is the kernel's here."""
    model_type, settings = ARCHITECTURES[architecture]
    backbone = Backbone(build(model_type, **settings).to(device))
    assert attention.is_kernel_trusted, "the base differs with the kernel and not without it"
    return backbone


def compiled_and_eager(architecture: str) -> list[list[Tensor]]:
    """Logits, hidden states and the caches of one pass, captured whole and not."""
    backbone, tree = serve(architecture, "cpu"), Tree.chain(3)
    outcomes = []
    for of in (TreePass(backbone), torch.compile(TreePass(backbone), backend="aot_eager", fullgraph=True)):
        cache = PagedCache(backbone.kv_shapes, 4, backbone.dtype, backbone.device)
        for pool in (*cache.keys, *cache.values):
            pool.copy_(torch.linspace(-1, 1, pool.numel()).view_as(pool))
        table_BP, length_B = 1 + torch.arange(4).view(2, 2), torch.tensor([5, 62])
        token_BN = torch.arange(8).view(2, 4)
        pools = cache.keys, cache.values
        with torch.inference_mode():
            tensors = (*tree.shape[:2], token_BN % 4, *tree.shape, torch.tensor(True))
            outputs = of(token_BN, length_B, table_BP, *tensors, *pools)
        outcomes.append([*outputs, *cache.keys, *cache.values])
    return outcomes


def test_torch_compile_captures_a_pass_whole(interpreted):
    """A break in the graph, or a cache that the graph changes in a copy of its own."""
    eager, compiled = interpreted(compiled_and_eager, "gemma2")
    assert all(map(torch.equal, eager, compiled))


def check_op(case: Case) -> dict[str, str]:
    from medusa_ray.medusa.kernels import tree_attention

    problem = Problem.of(case)
    tables = problem.tables
    return torch.library.opcheck(
        tree_attention,
        (
            problem.query_BHTE.transpose(1, 2),
            problem.cache.keys[0],
            problem.cache.values[0],
            tables.table_BP,
            tables.length_B,
            tables.sees_T,
            tables.depth_T,
            PAGE_SIZE,
            0.3,
            case.window,
            case.softcap,
            problem.sink_H,
        ),
    )


def test_the_op_is_what_it_claims_to_be(interpreted):
    """Its schema, its shapes and strides under tracing, and that it mutates nothing."""
    checks = interpreted(check_op, Case(nodes=3, groups=2, head_size=16, has_sink=True, lengths=(5, 70)))
    assert set(checks.values()) == {"SUCCESS"}


# ------------------------------------------------------------------------------------------ whole engine

TREE = Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1)])


def replies(
    base: Path, prompts: list[list[int]], num_tokens: int, tree: Tree | None, device: str
) -> list[Any]:
    """The engine's, half of whose guesses are right, those of transformers' generate, and the engine's steps."""
    backbone = Backbone.load(str(base), torch.float32, device)
    expected = reference.generate(backbone.model, prompts, num_tokens, batch_size=1)
    heads: Any = OracleHeads(backbone.hidden_size, backbone.vocab_size) if tree else None
    engine = Engine(backbone, heads, tree, max_batch_size=2, max_total_tokens=256)
    if heads:
        heads.engine, heads.replies = engine, {tuple(p): r for p, r in zip(prompts, expected, strict=True)}
    with mock.patch.object(attention, "read", side_effect=attention.read) as dense_read:
        done = engine.generate(prompts, max_new_tokens=num_tokens)
    # Of keys and of values. Only pieces of prompts may be longer than the kernel takes.
    assert dense_read.call_count <= 2 * len(backbone.kv_shapes) * len(prompts), (
        "trees were read by the dense path"
    )
    return [[c.token_ids for c in done], expected, sum(c.num_steps for c in done)]


PROMPTS = [[1, *range(20, 20 + length)] for length in (3, 62, 90)]


@pytest.mark.parametrize("tree", [None, TREE], ids=["baseline", "tree"])
def test_greedy_replies_by_the_kernel_equal_those_of_generate(interpreted, tiny_base, tree):
    ours, expected, num_steps = interpreted(replies, tiny_base, PROMPTS, 8, tree, "cpu")
    assert ours == expected
    num_tokens = sum(len(reply) - 1 for reply in ours)
    assert num_steps == num_tokens if tree is None else num_steps < num_tokens


def replies_of(architecture: str, device: str) -> list[list[list[int]]]:
    """The engine's over the widest tree, and those of transformers' generate."""
    model_type, settings = ARCHITECTURES[architecture]
    model = build(model_type, **settings).to(device)
    expected = [plain_reply(model, prompt, NEW_TOKENS) for prompt in prompts()]
    tree = Tree.published()
    heads = MedusaHeads(tree.depth, hidden_size=model.config.hidden_size, vocab_size=VOCAB).to(device).eval()
    engine = Engine(Backbone(model), heads, tree, max_total_tokens=128)
    assert attention.is_kernel_trusted, "the base differs with the kernel and not without it"
    done = engine.generate(prompts(), max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return [[completion.token_ids for completion in done], expected]


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_says_by_the_kernel_what_generate_says(interpreted, architecture):
    ours, expected = interpreted(replies_of, architecture, "cpu")
    assert ours == expected


def check_conformance(architecture: str) -> int:
    from medusa_ray.medusa import kernels

    with mock.patch.object(kernels, "splits_for", side_effect=kernels.splits_for) as launch:
        serve(architecture, "cpu")
    return launch.call_count


@pytest.mark.parametrize(
    "architecture", ["gemma2", "gemma4", "gpt_oss", "gpt_bigcode", "deepseek_v3", "mimo_v2_flash"]
)
def test_architectures_that_ask_for_more_are_served_by_the_kernel(interpreted, architecture):
    """Soft caps, windows, sinks, keys larger than values, layers of unlike shapes: as the models themselves ask."""
    assert interpreted(check_conformance, architecture) > 0


# --------------------------------------------------------------------------------------- without a GPU


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import medusa_ray.medusa.engine"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("capability", "dtype", "case"),
    [
        (80, torch.bfloat16, Case(nodes=16, groups=4, head_size=128, splits=4)),
        (90, torch.bfloat16, Case(nodes=16, groups=4, head_size=128, splits=4)),
        (90, torch.bfloat16, Case(nodes=1, groups=4, head_size=128, splits=1)),
        (90, torch.float32, Case(nodes=16, groups=4, head_size=128, splits=1)),
        (90, torch.bfloat16, Case(nodes=16, groups=1, head_size=192, value_size=128, splits=1)),
        (80, torch.bfloat16, Case(nodes=26, groups=2, head_size=256, window=512, softcap=50.0, splits=32)),
        (90, torch.float16, Case(nodes=64, groups=8, head_size=64, window=128, has_sink=True, splits=1)),
    ],
    ids=str,
)
def test_the_kernels_compile_for_gpus(monkeypatch, tmp_path, capability, dtype, case):
    """What the interpreter lets pass, the compiler may refuse; more shared memory than the GPU has is refused later."""
    from medusa_ray.medusa import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = {name: Launches(getattr(kernels, name)) for name in ("_attend", "_merge")}
    for name, recorder in launches.items():
        monkeypatch.setattr(kernels, name, recorder)
    Problem.of(case, dtype=dtype).by_kernel()
    assert [len(recorder.calls) for recorder in launches.values()] == [1, int(case.splits != 1)]
    for recorder in launches.values():
        for arguments, options in recorder.calls:
            assert shared_memory(recorder.kernel, arguments, options, capability) <= 99 * 1024


class Launches:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((arguments, options))


def shared_memory(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], capability: int) -> int:
    """Compiles a launch for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int64: "*i64",
        int: "i32",
        float: "fp32",
        type(None): "constexpr",
    }
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    signature = {name: types[getattr(value, "dtype", type(value))] for name, value in values.items()}
    constants = {name: None for name, value in values.items() if value is None}
    for name in set(options) & set(kernel.arg_names):
        signature[name], constants[name] = "constexpr", options.pop(name)
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [(i,) for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(kernel, signature, constants, {key: [["tt.divisibility", 16]] for key in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compiled_kernel_equals_the_slow_loop(case, dtype, tolerance):
    problem = Problem.of(case, "cuda", dtype)
    assert largest_difference(problem.by_kernel(), problem.by_slow_loop()) < tolerance
    assert largest_difference(problem.by_dense_path(), problem.by_slow_loop()) < tolerance


@pytest.mark.gpu
def test_one_cuda_graph_serves_contexts_of_any_length():
    problem = Problem.of(Case(nodes=16, groups=4, head_size=64), "cuda")
    tables = problem.tables
    problem.by_kernel(tables)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = problem.by_kernel(tables)
    for lengths in ((3, 5, 63, 130), (130, 0, 64, 1)):
        problem.length_B.copy_(torch.tensor(lengths))
        graph.replay()
        assert out.equal(problem.by_kernel(tables))


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_says_on_a_gpu_what_generate_says(architecture):
    ours, expected = replies_of(architecture, "cuda")
    assert ours == expected


@pytest.mark.gpu
@pytest.mark.parametrize("tree", [None, TREE], ids=["baseline", "tree"])
def test_greedy_replies_on_a_gpu_equal_those_of_generate(tiny_base, tree):
    ours, expected, _ = replies(tiny_base, PROMPTS, 40, tree, "cuda")
    assert ours == expected
