"""Files of tensors that anybody may have made -> tensors.

What a file says of itself is held against its size before memory is taken, and nothing is unpickled but by torch's
weights-only reader. Files are URIs: a few tensors of a large model cost a few reads of ranges.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Collection
from typing import Any, NamedTuple

import fsspec
import torch
from safetensors.torch import save
from torch import Tensor

MAX_HEADER = 4 * 2**20  # bytes; a thousand layers have some hundred KiB of names and shapes
MAX_JSON = 16 * 2**20  # bytes, of a config or an index

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


class Spec(NamedTuple):
    """A tensor in a file. dtype: by safetensors' name, one that heads never have may be none of DTYPES."""

    dtype: str
    shape: list[int]
    start: int  # byte of the file
    num_bytes: int


def specs(where: str) -> dict[str, Spec]:
    """The tensors of a safetensors file by name; its header alone is read.

    Raises FileNotFoundError, and ValueError for a file that is cut short or contradicts itself.
    """
    filesystem, path = fsspec.core.url_to_fs(where)
    size = filesystem.size(path)
    limit = max(0, min(size - 8, MAX_HEADER))
    with filesystem.open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > limit:
            raise ValueError(
                f"{where} is no whole safetensors file: it says that its header has {length:,} bytes, but there can be "
                f"{limit:,} at most. Copy or train it again."
            )
        text = file.read(length)
    try:
        found = {name: _spec(entry, 8 + length) for name, entry in _listed(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where} is no whole safetensors file: its header is none ({error!r}). Copy or train it again."
        ) from error
    for name, spec in found.items():
        numbers = math.prod(spec.shape)
        claimed = numbers * DTYPES[spec.dtype].itemsize if spec.dtype in DTYPES else spec.num_bytes
        end = spec.start + spec.num_bytes
        if spec.num_bytes != claimed or not 8 + length <= spec.start <= end <= size:
            raise ValueError(
                f"{where} is no whole safetensors file: {name} is {spec.dtype} {spec.shape} in bytes {spec.start:,} to "
                f"{end:,}, but the file has {size:,}. Copy or train it again."
            )
    if sum(spec.num_bytes for spec in found.values()) > size - 8 - length:
        raise ValueError(
            f"{where} has tensors that share their bytes, which safetensors forbids. Save it again."
        )
    return found


def read(where: str, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, all or those wanted of them. Raises what `specs` does."""
    found = specs(where)
    tensors = {}
    with fsspec.open(where, "rb") as file:
        for name in found if wanted is None else wanted:
            spec = found[name]
            if spec.dtype not in DTYPES:
                raise ValueError(
                    f"{where}: {name} is {spec.dtype}, but heads are {', '.join(DTYPES)}. Convert quantised heads back "
                    "first."
                )
            file.seek(spec.start)
            content = bytearray(file.read(spec.num_bytes))
            if len(content) != spec.num_bytes:
                raise ValueError(f"{where} ended within {name}. Copy it again.")
            dtype = DTYPES[spec.dtype]
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(spec.shape)
    return tensors


def read_pickled(where: str) -> dict[str, Tensor]:
    """The tensors by name of a file that torch.save wrote, on the CPU.

    Raises FileNotFoundError, and ValueError for anything but a plain dict of tensors in torch's own, uncompressed form.
    """
    filesystem, path = fsspec.core.url_to_fs(where)
    size = filesystem.size(path)
    try:
        with filesystem.open(path, "rb") as file:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("it unpacks to more bytes than it has, which none of torch's does")
            names = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(names) != 1 or names[0].file_size > MAX_HEADER:
                raise ValueError(f"its list of tensors is missing or over {MAX_HEADER:,} bytes")
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
    # torch names its errors by what went wrong inside, which is anything in a file that is not its own.
    except (
        ValueError,
        RuntimeError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"{where} is no file of weights that can be read without running code from it: {error}. Save a dict of "
            "tensors with torch.save, or better as safetensors."
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in found.items()
    ):
        raise ValueError(
            f"{where} holds {type(found).__name__}, but a dict of tensors by name was expected. Save the state_dict of "
            "the heads alone."
        )
    if sum(tensor.nbytes for tensor in found.values()) > size:
        raise ValueError(
            f"{where} has tensors that share their bytes, more than the file has. Save clones of them."
        )
    return found


def read_json(where: str) -> dict[str, Any]:
    """An object from a JSON file. Raises FileNotFoundError, and ValueError for anything else."""
    filesystem, path = fsspec.core.url_to_fs(where)
    if (size := filesystem.size(path)) > MAX_JSON:
        raise ValueError(f"{where} has {size:,} bytes, but {MAX_JSON:,} are the limit: it is none of ours.")
    try:
        with filesystem.open(path, "rb") as file:
            found = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is a {type(found).__name__}, but an object was expected. Copy it again.")
    return found


def write(where: str, tensors: dict[str, Tensor]) -> None:
    """A safetensors file as transformers' own are, whatever storage the tensors share."""
    filesystem, path = fsspec.core.url_to_fs(where)
    whole = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    filesystem.pipe_file(path, save(whole, metadata={"format": "pt"}))


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises ValueError for a tensor of numbers that are not all finite."""
    for name, tensor in tensors.items():
        low, high = tensor.aminmax()  # both are NaN when any number is
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                f"{where}: {name} goes from {low.item()} to {high.item()} as {tensor.dtype}, but heads are made of "
                "finite numbers. Train them again."
            )


def _listed(header: bytes) -> dict[str, Any]:
    found = json.loads(header)
    found.pop("__metadata__", None)
    return found


def _spec(entry: dict[str, Any], data: int) -> Spec:
    """data: the byte at which the file's tensors begin."""
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(f"{entry} has numbers that are none")
    return Spec(str(entry["dtype"]), shape, data + start, end - start)
