"""A base -> its tree pass compiled for this processor, kept on disk.

torch exports the pass with free numbers of sequences, nodes and pages, and AOTInductor makes one package of it, with
the weights inside in the layout that oneDNN multiplies fastest. A process of its own builds it, once for each base,
dtype, number of threads and version, so that an engine can serve eagerly meanwhile. Loading takes a tenth of a
second, and needs no compiler.

# B sequences   N tree nodes   P pages
"""

import argparse
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.export import Dim
from transformers.utils.hub import cached_file

from medusa_ray.medusa import acceptance, attention, backbone, cache, treepass
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PAGE_SIZE, PagedCache
from medusa_ray.medusa.tree import Tree
from medusa_ray.medusa.treepass import TreePass

Pass = Callable[..., tuple[Tensor, ...]]  # as TreePass.forward

MAX_ROWS, MAX_NODES, MAX_PAGES = 4096, 4096, 2**16
# Another order of summation: 1e-6 in float32, a few roundings at 16 bits. A wrong shape or mask gives some tenths.
# The weights are constants, and those that multiply the same states are joined: on few rows a product costs less than
# its call.
INDUCTOR = {"freezing": True, "cpp.enable_concat_linear": True}
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
    package = package_of(base, dtype, revision)
    package.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{package}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two engines that start together, one builds
        if not package.exists():
            arguments = [base, dtype, str(package), str(torch.get_num_threads()), *filter(None, [revision])]
            done = subprocess.run(
                [sys.executable, "-m", __name__, *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            if done.returncode:
                tail = done.stderr.decode(errors="replace")[-2000:]
                raise RuntimeError(f"the pass of {base} could not be compiled. Its last output:\n{tail}")
    # Straight to the code: calling the package would take the pools apart anew in every step, for a tenth of a small
    # base's time.
    run = torch._inductor.aoti_load_package(str(package), run_single_threaded=True).loader.boxed_run

    def compiled_pass(*tensors_and_pools: Any) -> tuple[Tensor, ...]:
        *tensors, keys, values = tensors_and_pools
        return tuple(run([*tensors, *keys, *values]))

    return compiled_pass


def package_of(base: str, dtype: str, revision: str | None) -> Path:
    """Where the package of a base lies: its name tells apart all that the code in it depends on."""
    config = cached_file(base, "config.json", revision=revision)
    assert config is not None
    digest = hashlib.sha256()
    weights = sorted([*Path(config).parent.glob("*.safetensors"), *Path(config).parent.glob("*.bin")])
    sources = [module.__file__ for module in (acceptance, attention, backbone, cache, treepass)]
    for file in (config, *weights, *sources, __file__):
        assert file is not None
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    for fact in (dtype, torch.get_num_threads(), torch.__version__, transformers.__version__, processor):
        digest.update(f"{fact}\n".encode())
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "medusa_ray" / f"{digest.hexdigest()[:32]}.pt2"


def build(base: str, dtype: str, package: Path, revision: str | None = None) -> None:
    """Compiles the pass of a base for as many threads as torch now uses. The package appears at once or not at all."""
    tree_pass = TreePass(Backbone.load(base, getattr(torch, dtype), "cpu", revision))
    arguments, shapes = example(tree_pass.backbone)
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        # Only without gradients are weights constants, which oneDNN may lay out anew.
        with torch.no_grad():
            exported = torch.export.export(tree_pass, arguments, dynamic_shapes=shapes, strict=False)
            built = torch._inductor.aoti_compile_and_package(
                exported, package_path=f"{folder}/{package.name}", inductor_configs=INDUCTOR
            )
        os.rename(built, package)


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
            outcomes.append(run(*(tensor.contiguous() for tensor in tensors), keys, values))
        for mine_BNX, other_BNX in zip(*(outcome[:2] for outcome in outcomes), strict=True):
            apart_BN = (mine_BNX - other_BNX).float().norm(dim=-1) / other_BNX.float().norm(dim=-1)
            worst = max(worst, apart_BN.nan_to_num(math.inf).max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the tree pass of a base.")
    parser.add_argument("base")
    parser.add_argument("dtype")
    parser.add_argument("package", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("revision", nargs="?")
    args = parser.parse_args()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    build(args.base, args.dtype, args.package, args.revision)


def _end_with(parent: int) -> None:
    """Ends this process when the engine that waits for it is no more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
