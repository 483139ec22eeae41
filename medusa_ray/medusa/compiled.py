"""A base -> its tree pass compiled for this processor, a library on disk.

torch exports the pass with free numbers of sequences, nodes and pages, and AOTInductor makes one library of it, with
the weights inside in the layout that oneDNN multiplies fastest. A process of its own builds it, once for each base,
dtype, number of threads and version, so that an engine can serve eagerly meanwhile. Loading takes a tenth of a
second, and needs no compiler.

The library is called through its C interface (torch/csrc/inductor/aoti_runtime/interface.h). torch's own loader holds
Python's lock throughout the call: a server could read no request and send no token while a pass runs.

# B sequences   N tree nodes   P pages
"""

import argparse
import ctypes
import fcntl
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.export import Dim

from medusa_ray.medusa import acceptance, attention, backbone, cache, page_attention, treepass
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.base import cache_folder, files_of
from medusa_ray.medusa.cache import PAGE_SIZE, PagedCache
from medusa_ray.medusa.tree import Tree
from medusa_ray.medusa.treepass import Outcome, TreePass

Pass = Callable[..., tuple[Tensor, ...]]  # as TreePass.forward

MAX_ROWS, MAX_NODES, MAX_PAGES = 4096, 4096, 2**16
# The weights are constants, and those that multiply the same states are joined: on few rows a product costs less than
# its call.
INDUCTOR = {"freezing": True, "cpp.enable_concat_linear": True}
# Another order of summation: 1e-6 in float32, a few roundings at 16 bits. A wrong shape or mask gives some tenths.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 1e-1}


def why_not(device: str) -> str | None:
    """Why no pass can be compiled here, or None."""
    if device != "cpu":
        return "passes are compiled ahead of time for CPUs only"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler: {compiler} is not found"


def load_or_build(base: str, dtype: str, revision: str | None = None) -> Pass:
    """The compiled pass of a base for as many threads as torch now uses; builds it where it is not on disk yet.

    Raises OSError when the base cannot be read, RuntimeError when building fails.
    """
    library = library_of(base, dtype, revision)
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{library}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two engines that start together, one builds
        if not library.exists():
            arguments = [base, dtype, str(library), str(torch.get_num_threads()), *filter(None, [revision])]
            done = subprocess.run(
                [sys.executable, "-m", __name__, *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            if done.returncode:
                tail = done.stderr.decode(errors="replace")[-2000:]
                raise RuntimeError(f"the pass of {base} could not be compiled. Its last output:\n{tail}")
    return Library(library)


class Library:
    """A compiled pass. Raises RuntimeError when it cannot be loaded or a call fails; stderr then has the reason."""

    NUM_OUTPUTS = len(Outcome._fields)

    def __init__(self, file: Path) -> None:
        try:
            code = ctypes.CDLL(str(file))
        except OSError as error:
            raise RuntimeError(f"{file} cannot be loaded: {error}") from error
        self._run = code.AOTInductorModelContainerRunSingleThreaded
        self._container = ctypes.c_void_p()
        self._check(
            code.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None
            )
        )
        weakref.finalize(self, code.AOTInductorModelContainerDelete, self._container)
        self._outputs = (ctypes.c_void_p * self.NUM_OUTPUTS)()

    def __call__(self, *tensors_and_pools: Any) -> tuple[Tensor, ...]:
        *tensors, keys, values = tensors_and_pools
        # The call takes these handles over, and gives its outputs' handles to us.
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([*tensors, *keys, *values])
        inputs = (ctypes.c_void_p * len(handles))(*[_pointer_of(handle, None) for handle in handles])
        num_inputs, num_outputs = ctypes.c_size_t(len(handles)), ctypes.c_size_t(self.NUM_OUTPUTS)
        self._check(self._run(self._container, inputs, num_inputs, self._outputs, num_outputs, None, None))
        taken = [_capsule_of(pointer, None, None) for pointer in self._outputs]
        return tuple(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(taken))

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise RuntimeError(f"a compiled pass failed with AOTInductor's error {error}")


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype = ctypes.py_object
_capsule_of.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def library_of(base: str, dtype: str, revision: str | None) -> Path:
    """Where the library of a base lies: its name tells apart all that the code in it depends on."""
    digest = hashlib.sha256()
    modules = (acceptance, attention, backbone, cache, page_attention, treepass)
    sources = [module.__file__ for module in modules]
    for file in (*files_of(base, revision), *sources, page_attention.SOURCE, __file__):
        assert file is not None
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    for fact in (dtype, torch.get_num_threads(), torch.__version__, transformers.__version__, processor):
        digest.update(f"{fact}\n".encode())
    return cache_folder() / f"{digest.hexdigest()[:32]}.so"


def build(base: str, dtype: str, library: Path, revision: str | None = None) -> None:
    """Compiles the pass of a base for as many threads as torch now uses. The library appears at once or not at all.

    Raises RuntimeError where the code needs operators that only torch's own loader could call.
    """
    tree_pass = TreePass(Backbone.load(base, getattr(torch, dtype), "cpu", revision), torch.get_num_threads())
    arguments, shapes = example(tree_pass.backbone)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        options = {
            **INDUCTOR,
            "aot_inductor.custom_ops_to_c_shims": {
                page_attention.attend.default: [page_attention.DECLARATION]
            },
            "aot_inductor.custom_op_libs": [page_attention.build(folder)],
        }
        # Where compilers look for it.
        os.environ["LIBRARY_PATH"] = ":".join(filter(None, [folder, os.environ.get("LIBRARY_PATH")]))
        # Only without gradients are weights constants, which oneDNN may lay out anew.
        with torch.no_grad():
            exported = torch.export.export(tree_pass, arguments, dynamic_shapes=shapes, strict=False)
            built = torch._inductor.aoti_compile_and_package(
                exported, package_path=f"{folder}/pass.pt2", inductor_configs=options
            )
        with zipfile.ZipFile(built) as package:
            (code,) = (name for name in package.namelist() if name.endswith(".so"))
            if f"{code.removesuffix('.so')}.json" in package.namelist():
                raise RuntimeError("the code calls operators outside torch's C interface")
            os.rename(package.extract(code, folder), library)


def example(of: Backbone) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of a pass, and which of their dimensions are free.

    Sixteen tokens: oneDNN chooses the layout of a weight by their number, and this one's suits a single token and a
    long prompt as well.
    """
    num_rows, num_nodes, num_pages = 2, 8, 3
    tree = Tree.chain(num_nodes - 1)
    pool = PagedCache(of.kv_shapes, num_rows * num_pages, of.dtype, of.device)
    table_BP = 1 + torch.arange(num_rows * num_pages).view(num_rows, num_pages)
    arguments = (
        torch.zeros(num_rows, num_nodes, dtype=torch.long),
        torch.full((num_rows,), PAGE_SIZE),
        table_BP,
        tree.depth_N,
        tree.mask_NN,
        torch.arange(num_nodes).repeat(num_rows, 1),
        *(table.clone() for table in tree.shape),
        torch.tensor(True),
        pool.keys,
        pool.values,
    )
    rows, nodes = Dim("rows", min=1, max=MAX_ROWS), Dim("nodes", min=1, max=MAX_NODES)
    wanted, pages = Dim("wanted", min=1, max=MAX_NODES), Dim("pages", min=1, max=MAX_PAGES)
    slots = Dim("slots", min=PAGE_SIZE, max=MAX_PAGES * PAGE_SIZE)
    depth = Dim("depth", min=1, max=MAX_NODES)
    pools = [{0: slots}] * len(of.kv_shapes)
    shapes: tuple[Any, ...] = (
        {0: rows, 1: nodes}, {0: rows}, {0: rows, 1: pages}, {0: nodes}, {0: nodes, 1: nodes},
        {0: rows, 1: wanted}, {0: wanted}, {0: wanted, 1: wanted}, {0: wanted}, {0: wanted, 1: depth}, {}, pools, pools,
    )  # fmt: skip
    return arguments, shapes


def difference(ours: Pass, theirs: Pass, of: Backbone) -> float:
    """Of two passes of a base, on random tokens and a random cache: the largest, as a part of a vector's norm.

    Two rows of eight nodes, and one of one: what a compiler may take for granted differs between them.
    """
    draw = torch.Generator().manual_seed(0)
    token_BN = torch.randint(of.vocab_size, (2, 8), generator=draw)
    worst = 0.0
    for num_rows, num_nodes in ((2, 8), (1, 1)):
        outcomes = []
        shape = Tree.chain(7).prefix(num_nodes).shape
        for run in (ours, theirs):
            with torch.inference_mode(False):  # as pools of an engine are made: torch would compile for others anew
                (_, length_B, table_BP, *_, keys, values), _ = example(of)
            fill = torch.Generator().manual_seed(1)
            for pool in (*keys, *values):
                pool.copy_(torch.randn(pool.shape, generator=fill))
            tensors = (
                token_BN[:num_rows, :num_nodes],
                length_B[:num_rows],
                table_BP[:num_rows],
                shape.depth_N,
                shape.mask_NN,
                torch.arange(num_nodes).repeat(num_rows, 1),
                *shape,
                torch.tensor(True),
            )
            outcomes.append(run(*(tensor.to(of.device).contiguous() for tensor in tensors), keys, values))
        for mine_BNX, other_BNX in zip(*(outcome[:2] for outcome in outcomes), strict=True):
            apart_BN = (mine_BNX - other_BNX).float().norm(dim=-1) / other_BNX.float().norm(dim=-1)
            worst = max(worst, apart_BN.nan_to_num(math.inf).max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the tree pass of a base.")
    parser.add_argument("base")
    parser.add_argument("dtype")
    parser.add_argument("library", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("revision", nargs="?")
    args = parser.parse_args()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    build(args.base, args.dtype, args.library, args.revision)


def _end_with(parent: int) -> None:
    """Ends this process when the engine that waits for it is no more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
