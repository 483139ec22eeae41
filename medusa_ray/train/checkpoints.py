"""A run's state -> checkpoints in training/, each whole or absent, and the newest whole one back.

A checkpoint is a folder step_NNNNNNNN: state.json, safetensors of what is trained, nothing of the base, and at last
manifest.json with the digest of each. It holds whole tensors, so that any number of workers, and any ZeRO stage, can go
on from it.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import fsspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from medusa_ray import provenance

LOG = logging.getLogger("medusa_ray")
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    name: str
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def write(training: str, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """tensors: named kind/name; each kind becomes a file. Raises OSError when there is no room."""
    filesystem, path = fsspec.core.url_to_fs(f"{training}/{name_of(step)}")
    filesystem.makedirs(path, exist_ok=True)
    contents = {STATE: json.dumps(state).encode()}
    digests = {STATE: hashlib.sha256(contents[STATE]).hexdigest()}
    filesystem.pipe_file(f"{path}/{STATE}", contents[STATE])
    for kind, names in groupby(sorted(tensors), key=lambda name: name.split("/")[0]):
        # One file's bytes at a time: own output layers of a large base are gigabytes.
        whole = safetensors.torch.save({name: tensors[name].contiguous().cpu() for name in names})
        digests[f"{kind}.safetensors"] = hashlib.sha256(whole).hexdigest()
        filesystem.pipe_file(f"{path}/{kind}.safetensors", whole)
    provenance.write_json(f"{training}/{name_of(step)}/{MANIFEST}", {"step": step, "sha256": digests})


def newest(training: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; each newer one that is not is named in the log."""
    for name in reversed(names(training)):
        try:
            return read(training, name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            LOG.warning(
                "stage=train checkpoint=%s is not whole, so the one before it is taken: %s", name, error
            )
    return None


def read(training: str, name: str) -> Checkpoint:
    """Raises OSError, ValueError, KeyError or SafetensorError when it is not whole."""
    filesystem, path = fsspec.core.url_to_fs(f"{training}/{name}")
    manifest = provenance.read_json(f"{training}/{name}/{MANIFEST}")
    state: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for file, digest in manifest["sha256"].items():
        whole = filesystem.cat_file(f"{path}/{file}")
        if hashlib.sha256(whole).hexdigest() != digest:
            raise ValueError(f"the contents of {file} are not those that were written")
        if file == STATE:
            state = json.loads(whole)
        else:
            tensors |= safetensors.torch.load(whole)
    return Checkpoint(name, state, tensors)


def names(training: str) -> list[str]:
    """Checkpoints in the order of their steps, whole or not."""
    filesystem, path = fsspec.core.url_to_fs(training)
    filesystem.invalidate_cache()
    if not filesystem.isdir(path):
        return []
    found = [file.rstrip("/").split("/")[-1] for file in filesystem.ls(path, detail=False)]
    return sorted(name for name in found if name.startswith("step_"))


def keep(training: str, kept: set[str]) -> None:
    """Removes all other checkpoints but the two newest: if one turns out broken there is one before it."""
    filesystem, path = fsspec.core.url_to_fs(training)
    found = names(training)
    for name in set(found) - kept - set(found[-2:]):
        filesystem.rm(f"{path}/{name}", recursive=True)
