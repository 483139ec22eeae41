"""A folder, URI or hub name -> the base model, its PEFT adapter merged in, and what can be known of it unloaded.

Everybody loads a base here, so that an adapter's folder is a base like any other, whoever asks for it.

# V vocabulary   C hidden
"""

import fcntl
import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import cached_file, find_adapter_config_file

Quantization = Literal["none", "4bit"]

INDEX, WEIGHTS, ADAPTER_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "adapter_model.safetensors",
)
# Tied embeddings are stored once, under the name of the input side.
OUTPUT_LAYERS = ("lm_head.weight", "embed_tokens.weight")


def cache_folder() -> Path:
    """Where this machine keeps what is made or brought once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa_ray"


def fetched(base: str) -> str:
    """The folder of this machine that holds the base of a URI; folders and hub names are themselves.

    The first process that asks brings it, to XDG_CACHE_HOME or ~/.cache, the others wait; a base that has changed is
    another one. Raises OSError when nothing is there.
    """
    if "://" not in base:
        return base
    filesystem, path = fsspec.core.url_to_fs(base)
    files = sorted(filesystem.find(path))
    if not files:
        raise FileNotFoundError(f"there is nothing at {base}")
    stamp = json.dumps([base, *([file, filesystem.ukey(file)] for file in files)])
    folder = cache_folder() / "bases" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            for file in files:
                target = unfinished / os.path.relpath(file, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(file, str(target))
            unfinished.rename(folder)
    return str(folder)


def load(
    base: str,
    dtype: torch.dtype | Literal["auto"],
    device: str,
    revision: str | None = None,
    quantization: Quantization = "none",
    num_shards: int = 1,
) -> PreTrainedModel:
    """The model of a folder, URI or hub name, an adapter's merged into the base that it names.

    dtype: "auto" is the one that it is stored in. revision: of the hub name given. num_shards: of so many processes in
    torch's process group each calls this, and gets a shard. Raises OSError when it is neither, ValueError for what
    cannot be loaded, a missing package among it.
    """
    base = fetched(base)
    options: dict[str, Any] = {"dtype": dtype}
    if num_shards > 1:
        check_shards(base, num_shards, device, revision, quantization)
        options |= {"distributed_config": DistributedConfig(tp_size=num_shards)}
    if quantization == "4bit":
        options |= {"quantization_config": _four_bits(dtype, device), "device_map": {"": device}}
    name, base_revision = under_adapter(base, revision)
    model: Any = AutoModelForCausalLM.from_pretrained(name, revision=base_revision, **options)
    if quantization == "none" and num_shards == 1:
        model = model.to(device)
    if name != base:
        if find_spec("peft") is None:
            raise ValueError(
                f"{base} is an adapter, and merging it needs the package peft, which is not installed. Install "
                "medusa_ray[lora], or set the base to a merged model."
            )
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, base, revision=revision).merge_and_unload()
        except RuntimeError as error:  # weights of another shape
            raise ValueError(f"the adapter {base} does not fit its base {name}: {error}") from error
    return model.eval()


def check_shards(
    base: str, num_shards: int, device: str, revision: str | None, quantization: Quantization = "none"
) -> None:
    """Raises ValueError for a base that cannot be laid out over so many processes."""
    if device == "cpu" and torch.accelerator.is_available():
        raise ValueError(
            f"tensor_parallel is {num_shards} on device cpu, but transformers lays a base over the GPUs there are. "
            "Set device to cuda, or tensor_parallel to 1."
        )
    base = fetched(base)
    name, base_revision = under_adapter(base, revision)
    if name != base or quantization != "none":
        what = "an adapter" if name != base else "quantized"
        raise ValueError(
            f"tensor_parallel is {num_shards}, but {base} is {what}, and only plain weights are split between "
            "processes. Set tensor_parallel to 1, or the base to a merged model in plain weights."
        )
    config = text_config(base, base_revision)
    if not config.base_model_tp_plan:
        raise ValueError(
            f"tensor_parallel is {num_shards}, but transformers has no tensor-parallel plan for {config.model_type}. "
            "Set tensor_parallel to 1."
        )
    for count in ("num_attention_heads", "num_key_value_heads"):
        if (num_heads := getattr(config, count, None)) is not None and num_heads % num_shards:
            raise ValueError(
                f"tensor_parallel is {num_shards}, but {base} has {num_heads} {count}, which do not divide into so "
                "many parts. Set tensor_parallel to a divisor of them."
            )


def under_adapter(base: str, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the model below an adapter, a folder or hub name; those given for what is no adapter.

    A base at a URI is a folder here. Raises ValueError for an adapter that names no base.
    """
    file = find_adapter_config_file(base, revision=revision)
    if file is None:
        return base, revision
    adapter = json.loads(Path(file).read_text(encoding="utf-8"))
    name = adapter.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"the adapter {base} does not say what it adapts. Give its adapter_config.json a "
            "base_model_name_or_path, a folder or hub name."
        )
    # A relative folder is one of the place where the adapter was trained, or lies near it.
    beside = Path(base) / name
    if beside.exists() and not Path(name).exists():
        name = str(beside.resolve())
    return fetched(name), adapter.get("revision")


def text_config(base: str, revision: str | None = None) -> Any:
    """The config of the language model in a base. Raises OSError or ValueError when there is none."""
    name, revision = under_adapter(fetched(base), revision)
    return AutoConfig.from_pretrained(name, revision=revision).get_text_config()


def files_of(base: str, revision: str | None = None) -> list[Path]:
    """Every file that the weights of a base depend on: its config and tensors, an adapter's too."""
    base = fetched(base)
    name, base_revision = under_adapter(base, revision)
    configs = [cached_file(name, "config.json", revision=base_revision)]
    if name != base:
        configs.append(find_adapter_config_file(base, revision=revision))
    folders = [Path(config).parent for config in configs if config is not None]
    weights = [
        file for folder in folders for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)
    ]
    return [*map(Path, filter(None, configs)), *sorted(weights)]


def output_weight(base: str, revision: str | None = None) -> Tensor:
    """Weight [V, C] of the output layer: that tensor alone, without the model around it wherever that can be.

    Raises OSError when the base cannot be read, ValueError when it has no safetensors or none of the usual names.
    """
    base = fetched(base)
    name, base_revision = under_adapter(base, revision)
    if name != base:
        adapter = _find(base, ADAPTER_WEIGHTS, revision)
        layers = {ending.removesuffix(".weight") for ending in OUTPUT_LAYERS}
        if adapter is None or any(layer in key for key in _names(adapter) for layer in layers):
            model: Any = load(base, "auto", "cpu", revision)
            return model.get_output_embeddings().weight.detach()
    if index := _find(name, INDEX, base_revision):
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    elif single := _find(name, WEIGHTS, base_revision):
        files = dict.fromkeys(_names(single), WEIGHTS)
    else:
        raise ValueError(f"the base {name} has no {WEIGHTS}. Save it in that format.")
    for ending in OUTPUT_LAYERS:
        for tensor in files:
            if tensor.endswith(ending):
                with safe_open(_find(name, files[tensor], base_revision), framework="pt") as file:
                    return file.get_tensor(tensor)
    raise ValueError(
        f"the base {name} has tensors {list(files)[:3]}..., but neither lm_head.weight nor "
        "embed_tokens.weight, from which heads start. Set model.base to a Llama-like model."
    )


def _find(base: str, file: str, revision: str | None) -> str | None:
    options: Any = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(base, file, revision=revision, **options)


def _names(file: str) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _four_bits(dtype: torch.dtype | Literal["auto"], device: str) -> BitsAndBytesConfig:
    """QLoRA's NF4. Raises ValueError where bitsandbytes is missing or has no GPU."""
    if not device.startswith("cuda"):
        raise ValueError(
            f"model.quantization is '4bit', which needs a GPU, but the base is to run on {device!r}. Set "
            "model.quantization to 'none', or model.device to 'cuda' where there is one."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.quantization is '4bit', and that needs the package bitsandbytes, which is not installed. "
            "Install medusa_ray[quantized], or set model.quantization to 'none'."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
