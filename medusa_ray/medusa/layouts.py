"""Heads <-> the names and files by which other servers and trainers know them.

Ours are TGI's (`heads.py`), and what every format holds follows from what its reader does with a file:

    format          weights                       names
    tgi             medusa_lm_head.safetensors    {h}.{l}.linear.weight, .bias, {h}.{L}.weight
    trtllm          medusa_lm_head.safetensors    the same
    fasterdecoding  medusa_lm_head.pt             the same
    vllm            model.safetensors             blocks.{h}.layers.{l}.weight, .bias, lm_heads.{h}.weight, token_map
    modelopt        among a whole model's         medusa_heads.{h}.{l}.linear.weight, .bias, medusa_heads.{h}.{L}.weight

TGI: server/text_generation_server/layers/medusa.py; TensorRT-LLM: tensorrt_llm/models/medusa/weight.py and
examples/medusa; FasterDecoding: medusa/model/medusa_model.py, and `medusa_head.` before the names in whole models of
its later version; vLLM: vllm/model_executor/models/medusa.py and vllm/transformers_utils/configs/medusa.py; ModelOpt:
modelopt/torch/speculative/plugins/transformers.py.

# H heads   L blocks of a head   C hidden   V vocabulary   M draft vocabulary
"""

import re
from typing import Any, Literal, NamedTuple

import fsspec
import torch
from torch import Tensor

from medusa_ray.medusa import tensors as files
from medusa_ray.medusa.heads import EXTENDED_WEIGHTS, WEIGHTS, MedusaHeads

Format = Literal["tgi", "vllm", "trtllm", "modelopt", "fasterdecoding"]

PICKLED_WEIGHTS = "medusa_lm_head.pt"
MODEL_WEIGHTS, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIXES = ("medusa_heads.", "medusa_head.", "")  # of a whole model's heads; a file of heads alone has none
QUANTISED = ("input_scale", "weight_scale")


class Foreign(NamedTuple):
    """Heads as another project has written them, by our names."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    output_MC: Tensor | None  # the output layer that all heads share, where the file has it
    is_model: bool  # whether the folder is a whole model, heads and base
    where: str  # of the weights
    notes: list[str]  # what its user should know

    @property
    def vocab_size(self) -> int | None:
        """The base's, where the folder shows it: in its config, or by output layers that have a row for each token."""
        if type(said := self.config.get("vocab_size")) is int:
            return said
        if "token_map_M" in self.tensors:
            return None
        outputs = [tensor for name, tensor in self.tensors.items() if re.fullmatch(r"0\.\d+\.weight", name)]
        return len(outputs[0]) if outputs and outputs[0].dim() == 2 else None


# ------------------------------------------------------------------------------------------------------ export


def fitted(heads: MedusaHeads, layout: Format, output_VC: Tensor | None, materialise: bool) -> MedusaHeads:
    """The heads in a shape that a format holds: as they are, or each with an output layer of its own.

    output_VC: the base's output layer; needed wherever heads share it, but in TGI's format. Raises ValueError for heads
    that the format cannot hold, and says whether `materialise` would help.
    """
    if _holds(layout, heads):
        return heads
    what = f"heads of layout {heads.layout} with {heads.num_layers} block(s)"
    if heads.token_map_M is not None:
        what += f" and {heads.draft_vocab_size} of {heads.vocab_size} tokens"
    if heads.token_map_M is not None and layout != "vllm" and heads.layout != "shared":
        raise ValueError(
            f"{layout} cannot hold {what}: it wants a row for every token, and these heads were trained without most "
            "of them. Export to vllm, or train with heads.draft_vocab_size: null."
        )
    if not materialise:
        raise ValueError(
            f"{layout} cannot hold {what}. --materialise writes out an output layer of {heads.vocab_size} tokens for "
            "each head; they then take the memory and time of layout own."
        )
    assert output_VC is not None
    full = heads if layout == "vllm" else _unmapped(heads, output_VC)
    return full if _holds(layout, full) else _materialised(full)


def _holds(layout: Format, heads: MedusaHeads) -> bool:
    if layout == "vllm":
        return heads.layout != "lowrank"
    if layout == "tgi":
        return heads.fits_tgi
    return heads.layout == "own" and heads.token_map_M is None


def _unmapped(heads: MedusaHeads, output_VC: Tensor) -> MedusaHeads:
    """The same heads, guessing from the whole vocabulary where the base's output layer lets them."""
    if heads.token_map_M is None:
        return heads
    tensors = {name: tensor for name, tensor in heads.state_dict().items() if name != "token_map_M"}
    full = MedusaHeads.of(tensors, heads.vocab_size)
    full.init_from(output_VC)
    return full


def _materialised(heads: MedusaHeads) -> MedusaHeads:
    """The same guesses from heads of layout "own"."""
    blocks = {name: tensor for name, tensor in heads.state_dict().items() if ".linear." in name}
    if heads.token_map_M is not None:
        blocks["token_map_M"] = heads.token_map_M
    for head in range(heads.num_heads):
        output_MC = heads.output_weight(head)
        if heads.layout == "lowrank":
            term = heads.low_rank_term(head)
            delta_MC = term.up.weight.detach().float() @ term.down.weight.detach().float()
            output_MC = output_MC.float() + delta_MC
        blocks[f"{head}.{heads.num_layers}.weight"] = output_MC.detach().to(heads.dtype)
    return MedusaHeads.of(blocks, heads.vocab_size)


def names_of(heads: MedusaHeads, layout: Format) -> dict[str, Tensor]:
    """The tensors of heads that the format holds, by its names."""
    ours = heads.state_dict()
    if layout == "modelopt":
        return {f"medusa_heads.{name}": tensor for name, tensor in ours.items()}
    if layout != "vllm":
        return ours
    theirs = {_vllm_name(name): tensor for name, tensor in ours.items()}
    if heads.shares_output:
        theirs["lm_heads.0.weight"] = heads.output_weight(0)
    return theirs


def config_of(heads: MedusaHeads, layout: Format, base: str) -> dict[str, Any]:
    """What config.json has to say; for modelopt, beside what it says of the base."""
    if layout == "modelopt":
        return {
            "medusa": {"num_medusa_heads": heads.num_heads, "num_medusa_layers": heads.num_layers},
        }
    if layout != "vllm":
        return heads.config(base)
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "base_model_name_or_path": base,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "truncated_vocab_size": heads.draft_vocab_size,
        "num_heads": heads.num_heads,
        "num_hidden_layers": heads.num_layers,
        "medusa_fc_bias": True,  # without it vLLM drops the biases and says nothing
        "original_lm_head": heads.shares_output,
    }


def modelopt_state(heads: MedusaHeads) -> dict[str, Any]:
    """What ModelOpt looks for beside a model, in modelopt_state.pth, to know that it has heads."""
    config = {"medusa_num_heads": heads.num_heads, "medusa_num_layers": heads.num_layers}
    mode = ("medusa", {"config": config, "metadata": {}})
    return {"modelopt_state_dict": [mode], "modelopt_version": "0.47.0"}


def _vllm_name(name: str) -> str:
    if name == "token_map_M":
        return "token_map"
    head, layer, *rest = name.split(".")
    return f"lm_heads.{head}.weight" if rest == ["weight"] else f"blocks.{head}.layers.{layer}.{rest[-1]}"


# ------------------------------------------------------------------------------------------------------ import


def read(folder: str) -> Foreign:
    """Heads from a folder or URI in any of the formats, found by the names of its tensors.

    Nothing but the heads is read from a whole model. Raises ValueError when there are none, or when the file is not
    what it says that it is.
    """
    where, tensors, is_model = _tensors_in(folder)
    try:
        config = files.read_json(f"{folder}/config.json")
    except FileNotFoundError:
        config = {}
    if quantised := [name for name in tensors if name.endswith(QUANTISED)]:
        raise ValueError(
            f"{where} has {quantised[0]}: its heads are quantised, which cannot be undone here. Export them from "
            "ModelOpt in bfloat16."
        )
    notes: list[str] = []
    ours, shared = {}, []
    for name, tensor in tensors.items():
        if (our_name := _our_name(name, tensors)) is None:
            shared.append(tensor)
        else:
            ours[our_name] = tensor
    num_heads = _count(ours, r"(\d+)\.0\.linear\.weight")
    num_layers = _count(ours, r"0\.(\d+)\.linear\.weight")
    own = [name for head in range(num_heads) if (name := f"{head}.{num_layers}.weight") in ours]
    if len(own) == 1 and (num_heads > 1 or config.get("original_lm_head")):
        shared.append(ours.pop(own[0]))
    if not any(name.endswith(".linear.bias") for name in ours):
        notes.append("the biases of the blocks are missing, as vLLM's converter has lost them: zeros instead")
        for name, tensor in list(ours.items()):
            if name.endswith(".linear.weight"):
                ours[name.replace("weight", "bias")] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    output_MC = shared[0] if shared else None
    if "token_map_M" in ours:
        output_MC = _sort_map(ours, output_MC, num_layers)
    said = config.get("medusa_num_heads", config.get("num_heads"))
    if not is_model and said not in (None, num_heads):
        notes.append(f"config.json says {said} heads, the tensors are {num_heads}: taken as {num_heads}")
    return Foreign(ours, config, output_MC, is_model, where, notes)


def layouted(found: Foreign, output_VC: Tensor | None, vocab_size: int | None) -> MedusaHeads:
    """Our heads of what was found. output_VC: the base's output layer, to tell whether theirs is that one.

    A shared output layer that is not the base's becomes each head's own. Raises ValueError for tensors that are not
    heads of one shape.
    """
    tensors, output_MC = dict(found.tensors), found.output_MC
    if output_MC is not None:
        rows_MC = output_VC
        if rows_MC is not None and "token_map_M" in tensors:
            rows_MC = rows_MC[tensors["token_map_M"]]
        if rows_MC is None or not torch.equal(rows_MC.to(output_MC.dtype), output_MC):
            found.notes.append("the output layer that all heads share is not the base's: each gets a copy")
            num_layers = _count(tensors, r"0\.(\d+)\.linear\.weight")
            for head in range(_count(tensors, r"(\d+)\.0\.linear\.weight")):
                tensors[f"{head}.{num_layers}.weight"] = output_MC
    return MedusaHeads.of(tensors, vocab_size, found.where)


def _tensors_in(folder: str) -> tuple[str, dict[str, Tensor], bool]:
    """File, tensors of the heads by their names there but for a prefix, and whether it is a whole model."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    if not filesystem.isdir(path):
        raise ValueError(f"{folder} is no folder. Give the one that has the heads' config.json and weights.")
    present = {name.rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False)}
    for name in (WEIGHTS, EXTENDED_WEIGHTS):
        if name in present:
            where = f"{folder}/{name}"
            return where, files.read(where), False
    if MODEL_INDEX in present or MODEL_WEIGHTS in present:
        return _tensors_in_model(folder, MODEL_INDEX in present)
    if PICKLED_WEIGHTS in present:
        where = f"{folder}/{PICKLED_WEIGHTS}"
        return where, files.read_pickled(where), False
    raise ValueError(
        f"{folder} has {sorted(present)[:6]}, but heads are in {WEIGHTS}, {MODEL_WEIGHTS} or {PICKLED_WEIGHTS}. Give "
        "the folder that has one of them."
    )


def _tensors_in_model(folder: str, is_indexed: bool) -> tuple[str, dict[str, Tensor], bool]:
    file_of: Any
    if is_indexed:
        file_of = files.read_json(f"{folder}/{MODEL_INDEX}").get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise ValueError(f"{folder}/{MODEL_INDEX} has no weight_map of names. Copy it again.")
        for file in file_of.values():
            if not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise ValueError(
                    f"{folder}/{MODEL_INDEX} names the file {file!r}, but only safetensors files beside it are read."
                )
    else:
        file_of = dict.fromkeys(files.specs(f"{folder}/{MODEL_WEIGHTS}"), MODEL_WEIGHTS)
    firsts = ("0.0.linear.weight", "blocks.0.layers.0.weight")
    prefix = next((prefix for prefix in PREFIXES if any(prefix + first in file_of for first in firsts)), None)
    if prefix is None:
        raise ValueError(
            f"{folder} has tensors {sorted(file_of)[:3]}..., but no heads: neither {firsts[0]} nor {firsts[1]}, with "
            f"or without {PREFIXES[0]} or {PREFIXES[1]}."
        )
    wanted = [name for name in file_of if name.startswith(prefix)]
    found: dict[str, Tensor] = {}
    for file in sorted({file_of[name] for name in wanted}):
        read = files.read(f"{folder}/{file}", [name for name in wanted if file_of[name] == file])
        found |= {name.removeprefix(prefix): tensor for name, tensor in read.items()}
    where = f"{folder}/{MODEL_INDEX if is_indexed else MODEL_WEIGHTS}"
    return where, found, len(wanted) < len(file_of)


def _is_vllm(tensors: dict[str, Tensor]) -> bool:
    return "blocks.0.layers.0.weight" in tensors


def _our_name(name: str, tensors: dict[str, Tensor]) -> str | None:
    """Our name of a tensor; None for an output layer that is not one head's."""
    if name == "lm_head.weight":
        return None
    if not _is_vllm(tensors):
        return name
    if name == "token_map":
        return "token_map_M"
    if match := re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", name):
        return f"{match[1]}.{match[2]}.linear.{match[3]}"
    if match := re.fullmatch(r"lm_heads\.(\d+)\.weight", name):
        num_layers = _count(tensors, rf"blocks\.{match[1]}\.layers\.(\d+)\.weight")
        return f"{match[1]}.{num_layers}.weight"
    return name  # MedusaHeads.of refuses it


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.fullmatch(pattern, name))})


def _sort_map(ours: dict[str, Tensor], output_MC: Tensor | None, num_layers: int) -> Tensor | None:
    """Puts the token map in our order, and all output layers with it; theirs may have rows for all tokens."""
    token_map_M, order_M = ours["token_map_M"].long().flatten().sort()

    def ordered(weight_MC: Tensor) -> Tensor:
        rows_M = order_M if len(weight_MC) == len(order_M) else token_map_M
        if len(rows_M) and not 0 <= int(rows_M.min()) <= int(rows_M.max()) < len(weight_MC):
            raise ValueError(
                f"the token map names tokens {int(rows_M.min())} to {int(rows_M.max())}, but an output layer has "
                f"{len(weight_MC)} rows. These are not heads of one shape."
            )
        return weight_MC[rows_M]

    ours["token_map_M"] = token_map_M
    for name in ours:
        if re.fullmatch(rf"\d+\.{num_layers}\.weight", name):
            ours[name] = ordered(ours[name])
    return None if output_MC is None else ordered(output_MC)
