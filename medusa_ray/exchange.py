"""heads/ -> folders that other servers and trainers load, and back."""

import io
import os
from typing import Any

import fsspec
import torch
from torch import Tensor

from medusa_ray import provenance
from medusa_ray.config import UserError
from medusa_ray.medusa import layouts, tensors
from medusa_ray.medusa.heads import WEIGHTS, MedusaHeads
from medusa_ray.medusa.layouts import Format

# medusa.base needs transformers, which takes half a second: it is imported where a base is read.

BESIDE = ("tree.json", "accuracy.json", "README.md")  # what goes with heads, byte by byte
HEADS_OF_MODEL = "model-medusa-heads.safetensors"  # the file of a whole model that has its heads
BASE_OF_MODEL = "model-base.safetensors"  # and that of its base, where one file holds it
MODELOPT_STATE = "modelopt_state.pth"  # ModelOpt looks for no other name


def export(
    heads: str,
    out: str,
    layout: Format,
    base: str | None = None,
    materialise: bool = False,
    with_base: bool = False,
) -> str:
    """Writes heads as another project loads them into a new folder, bit for bit; returns that folder.

    heads, out: folders or URIs; where the base is written too, which modelopt always wants, out is a local one. base:
    what takes the place of the folder or hub name that the heads were trained on, such as where the server finds it.
    with_base: the base goes to base/, an adapter merged into it, for servers that know no adapters. Raises UserError
    for heads that cannot be read, or that the format cannot hold.
    """
    _check_new(out)
    try:
        whole = MedusaHeads.load(heads, dtype=None)
        base = base or tensors.read_json(f"{heads}/config.json")["base_model_name_or_path"]
        output_VC = None
        if whole.shares_output and not (layout == "tgi" and whole.fits_tgi):
            output_VC = _output_layer(base).to(whole.dtype)
            whole.init_from(output_VC)
        fitted = layouts.fitted(whole, layout, output_VC, materialise)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{heads} cannot be exported to {layout}: {error}") from error
    named = layouts.names_of(fitted, layout)
    if layout == "modelopt":
        folder = _save_base(base, out)
        _add_heads(folder, named, layouts.config_of(fitted, layout, base), layouts.modelopt_state(fitted))
    else:
        served = _save_base(base, f"{out}/base") if with_base else base
        _write_heads(out, layout, named, layouts.config_of(fitted, layout, served))
    _copy_beside(heads, out)
    inputs = {"heads": provenance.digest(heads)}
    provenance.write(out, {"format": layout, "base": base, "materialise": materialise}, inputs)
    return out


def import_heads(folder: str, out: str, base: str | None = None) -> tuple[str, list[str]]:
    """Reads heads of any of the formats into a new folder as ours; returns it, and what its user should know.

    base: folder or hub name of their base, where their config names none, or another. Raises UserError for a folder
    that has no heads, or whose files are not what they say.
    """
    _check_new(out)
    try:
        found = layouts.read(folder)
        named = folder if found.is_model else found.config.get("base_model_name_or_path")
        base = base or named
        if not isinstance(base, str) or not base:
            raise ValueError("its config.json does not name the base. Give it with --base")
        vocab_size = found.vocab_size
        output_VC = None
        if found.output_MC is not None or vocab_size is None:
            output_VC = _output_layer(base)
            vocab_size = len(output_VC)
        heads = layouts.layouted(found, output_VC, vocab_size)
        tensors.check_finite(heads.state_dict(), found.where)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} cannot be imported: {error}") from error
    heads.save(out, base)
    _copy_beside(folder, out)
    provenance.write(out, {"imported": folder, "base": base}, {"heads": provenance.digest(folder)})
    return out, found.notes


def _check_new(out: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(out)
    kind = provenance.kind_of(filesystem, path)
    if kind == "file" or (kind == "directory" and filesystem.ls(path)):
        raise UserError(
            f"{out} is there already, and nothing is overwritten. Name another folder, or remove it first."
        )


def _output_layer(base: str) -> Tensor:
    from medusa_ray.medusa.base import output_weight

    try:
        return output_weight(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base {base}, whose output layer is needed, cannot be read: {error} Give another with --base."
        ) from error


def _write_heads(out: str, layout: Format, named: dict[str, Tensor], config: dict[str, Any]) -> None:
    filesystem, path = fsspec.core.url_to_fs(out)
    filesystem.makedirs(path, exist_ok=True)
    if layout == "fasterdecoding":
        whole = io.BytesIO()
        torch.save({name: tensor.detach().clone() for name, tensor in named.items()}, whole)
        filesystem.pipe_file(f"{path}/{layouts.PICKLED_WEIGHTS}", whole.getvalue())
    else:
        tensors.write(f"{out}/{layouts.MODEL_WEIGHTS if layout == 'vllm' else WEIGHTS}", named)
    provenance.write_json(f"{out}/config.json", config)


def _save_base(base: str, out: str) -> str:
    """The base, an adapter's merged, and its tokenizer; returns the folder as every process here finds it."""
    from transformers import AutoTokenizer

    from medusa_ray.medusa.base import fetched, load, under_adapter

    filesystem, folder = fsspec.core.url_to_fs(out)
    if "file" not in filesystem.protocol:
        raise UserError(
            f"{out} is no local folder, and a whole model can only be saved to one. Export there, and copy it."
        )
    try:
        model: Any = load(base, "auto", "cpu")
        tokenizer = AutoTokenizer.from_pretrained(under_adapter(fetched(base))[0])
    except (OSError, ValueError) as error:
        raise UserError(f"the base {base} cannot be read: {error}. Give another with --base.") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _add_heads(folder: str, named: dict[str, Tensor], config: dict[str, Any], state: dict[str, Any]) -> None:
    """Puts heads among the weights of a saved model, whose own files stay as they are."""
    try:
        index = provenance.read_json(f"{folder}/{layouts.MODEL_INDEX}")
    except FileNotFoundError:
        # Under its usual name transformers would take it for the whole model and ask no index.
        os.rename(f"{folder}/{layouts.MODEL_WEIGHTS}", f"{folder}/{BASE_OF_MODEL}")
        names = tensors.specs(f"{folder}/{BASE_OF_MODEL}")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, BASE_OF_MODEL)}
    tensors.write(f"{folder}/{HEADS_OF_MODEL}", named)
    index["weight_map"] |= dict.fromkeys(named, HEADS_OF_MODEL)
    index["metadata"]["total_size"] = sum(
        spec.num_bytes
        for file in set(index["weight_map"].values())
        for spec in tensors.specs(f"{folder}/{file}").values()
    )
    provenance.write_json(f"{folder}/{layouts.MODEL_INDEX}", index)
    provenance.write_json(f"{folder}/config.json", provenance.read_json(f"{folder}/config.json") | config)
    torch.save(state, f"{folder}/{MODELOPT_STATE}")


def _copy_beside(source: str, out: str) -> None:
    there, path = fsspec.core.url_to_fs(source)
    here, out_path = fsspec.core.url_to_fs(out)
    for name in BESIDE:
        if there.isfile(f"{path}/{name}") and there.size(f"{path}/{name}") <= tensors.MAX_JSON:
            here.pipe_file(f"{out_path}/{name}", there.cat_file(f"{path}/{name}"))
