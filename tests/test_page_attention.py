"""The CPU's kernel, called here as compiled code calls it: every case equals a slow loop in float64."""

import ctypes
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_architectures import ARCHITECTURES, build
from test_kernels import Case, Problem, beside_padding, largest_difference
from torch import Tensor

from medusa_ray.medusa import compiled, page_attention
from medusa_ray.medusa.attention import TreeTables
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.treepass import TreePass

needs_compiler = pytest.mark.skipif(compiled.why_not("cpu") is not None, reason="no C++ compiler")

CASES = [
    Case(nodes=1, groups=1, head_size=16),
    Case(nodes=1, groups=1, head_size=64, lengths=(0, 1, 63, 64, 65, 200)),
    Case(nodes=1, groups=8, head_size=64, window=20, lengths=(0, 19, 20, 64, 200)),
    Case(nodes=3, groups=1, head_size=32, lengths=(0, 1, 61, 62, 63, 64, 127)),
    Case(nodes=5, groups=2, head_size=48, value_size=32),
    Case(nodes=7, groups=7, head_size=80),
    Case(nodes=5, groups=1, head_size=16, value_size=80, window=3),
    Case(nodes=16, groups=4, head_size=128, lengths=(63, 64)),
    Case(nodes=26, groups=2, head_size=32, window=70, lengths=(0, 45, 71, 190)),
    Case(nodes=64, groups=4, head_size=16, lengths=(0, 63, 500)),
    Case(nodes=150, groups=1, head_size=64, lengths=(0, 30, 64)),
    Case(nodes=150, groups=2, head_size=16, window=40, lengths=(0, 100)),
]


@pytest.fixture(scope="module", params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """How many of them the operator takes, which any code can call meanwhile."""
    folder = tmp_path_factory.mktemp("code")
    name, libraries = page_attention.build(str(folder)), Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", "-fopenmp", "-Wl,--whole-archive", f"{folder}/lib{name}.a"]
    link += ["-Wl,--no-whole-archive", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", f"{folder}/code.so"], check=True)
    code = ctypes.CDLL(f"{folder}/code.so").aoti_torch_cpu_page_attention

    def attend(*arguments: Tensor | float | int) -> Tensor:
        *tensors, scale, window, num_threads = arguments
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        pointers = [ctypes.c_void_p(compiled._pointer_of(handle, None)) for handle in handles]
        out = ctypes.c_void_p()
        numbers = ctypes.c_double(scale), ctypes.c_int64(window), ctypes.c_int64(num_threads)
        assert code(*pointers, *numbers, ctypes.byref(out)) == 0
        (taken,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(
            [compiled._capsule_of(out, None, None)]
        )
        return taken

    library = torch.library.Library("medusa_ray", "IMPL", "CPU")
    library.impl("page_attention", attend)
    yield request.param
    library._destroy()


def tables_of(problem: Problem, threads: int) -> TreeTables:
    return TreeTables(problem.table_BP, problem.length_B, problem.depth_T, problem.mask_TT, threads)


# Measured 4e-6 and 5e-2, where values are up to 4 and bfloat16 has 8 bits.
@needs_compiler
@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [*((case, torch.float32, 1e-5) for case in CASES), *((case, torch.bfloat16, 1e-1) for case in CASES[3:8])],
    ids=str,
)
def test_the_kernel_equals_a_slow_loop(threads, case, dtype, tolerance):
    """A wrong mask, page or window shifts the output a little, and acceptance with it."""
    problem = Problem.of(case, dtype=dtype)
    out = problem.by_kernel(tables_of(problem, threads))
    assert largest_difference(out, problem.by_slow_loop()) < tolerance


MUTATIONS = {
    "one ancestor too many": lambda t: {"sees_T": t.sees_T | (torch.arange(len(t.sees_T)) == 1)},
    "no ancestor but itself": lambda t: {"sees_T": torch.eye(len(t.sees_T), dtype=torch.bool)},
    "a token too few": lambda t: {"length_B": t.length_B - 1},
    "a token too many": lambda t: {"length_B": t.length_B + 1},
    "slots for positions": lambda t: {"depth_T": torch.arange(len(t.depth_T))},
    "pages in another order": lambda t: {"table_BP": t.table_BP.flip(1).contiguous()},
}


@needs_compiler
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_table_is_seen(threads, mutation):
    """Else the comparison above would prove nothing."""
    problem = Problem.of(Case(nodes=16, groups=2, head_size=16, window=20, lengths=(70, 100)))
    tables = tables_of(problem, threads)
    wrong = replace(tables, **MUTATIONS[mutation](tables))
    assert largest_difference(problem.by_kernel(wrong), problem.by_slow_loop()) > 0.1


@needs_compiler
@pytest.mark.parametrize("length", [0, 64, 10**6])
def test_a_row_of_null_pages_is_harmless_whatever_its_length(threads, length):
    problem = Problem.of(Case(nodes=3, groups=2, head_size=16))
    alone, both = beside_padding(problem, tables_of(problem, threads), length)
    assert both[:-1].equal(alone)
    assert both[-1].isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "is_read_in_place"),
    [("gemma3", True), ("gemma2", False), ("gpt_oss", False), ("llama", False)],
)
def test_layers_that_the_kernel_cannot_compute_stay_dense(architecture, is_read_in_place):
    """It has windows, but no soft caps and no sinks, and heads of 8, as this llama's, fill no vector."""
    model_type, settings = ARCHITECTURES[architecture]
    backbone = Backbone(build(model_type, **settings))
    tree_pass = TreePass(backbone, cpu_threads=1)
    arguments, shapes = compiled.example(backbone)
    with torch.no_grad():
        exported = torch.export.export(tree_pass, arguments, dynamic_shapes=shapes, strict=False)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    num_layers = len(backbone.kv_shapes) if is_read_in_place else 0
    assert called.count(page_attention.attend.default) == num_layers


@needs_compiler
def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "broken.cpp"
    broken.write_text("no code")
    monkeypatch.setattr(page_attention, "SOURCE", broken)
    with pytest.raises(RuntimeError, match=r"cannot compile broken\.cpp: .*error"):
        page_attention.build(str(tmp_path))
