"""The operator that reads the cache's pages where they lie in a CPU's compiled pass, and its C++ (page_attention.cpp).

Compiled code alone calls it, through torch's C interface: eager passes gather the pages and use torch's own attention,
which is what the compiled pass is measured against before it is taken.

# B sequences   T nodes   P pages   L slots of the pool   H query heads   K key/value heads   E, U size of key, value
"""

import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from medusa_ray.medusa.cache import PAGE_SIZE

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 16  # as in the source
DTYPES = (torch.float32, torch.bfloat16)
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp", f"-DPAGE_SIZE={PAGE_SIZE}", "-Wno-psabi")

torch.library.define(
    "medusa_ray::page_attention",
    "(Tensor query_BHTE, Tensor keys_LKE, Tensor values_LKU, Tensor table_BP, Tensor length_B, Tensor mask_TT, "
    "Tensor depth_T, float scale, int window, int threads) -> Tensor",
)
attend = torch.ops.medusa_ray.page_attention
DECLARATION = (
    "AOTITorchError aoti_torch_cpu_page_attention(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, "
    "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, int64_t, int64_t, "
    "AtenTensorHandle*)"
)


@torch.library.register_fake("medusa_ray::page_attention")
def _(query_BHTE: Tensor, keys_LKE: Tensor, values_LKU: Tensor, *_: object) -> Tensor:
    B, H, T, _E = query_BHTE.shape
    return query_BHTE.new_empty(B, T, H, values_LKU.shape[2])


def takes(query_BHTE: Tensor, values_LKU: Tensor) -> bool:
    """Whether the code has what a layer needs."""
    sizes = query_BHTE.shape[3], values_LKU.shape[2]
    return query_BHTE.dtype in DTYPES and all(size % LANES == 0 for size in sizes)


def build(folder: str) -> str:
    """Compiles the code into a static library in a folder; returns the name that the linker knows it by.

    Raises RuntimeError with the compiler's own words when it fails.
    """
    source = SOURCE.read_bytes()
    # Who caches what links to it goes by the name alone.
    name = f"medusa_pages_{hashlib.sha256(source + ' '.join(FLAGS).encode()).hexdigest()[:16]}"
    code, include = f"{folder}/{name}.o", Path(torch.__file__).parent / "include"
    compile_ = [os.environ.get("CXX", "g++"), "-c", *FLAGS, f"-I{include}", str(SOURCE), "-o", code]
    for command in (compile_, ["ar", "rcs", f"{folder}/lib{name}.a", code]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} cannot compile {SOURCE.name}: {done.stderr[-1000:]}")
    return name
