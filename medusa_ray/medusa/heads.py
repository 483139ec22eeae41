"""Hidden states of the base -> guesses of the tokens after the next one.

Head k (from 0) sees the base's last hidden state at position t, after the final norm, and guesses token
t + 2 + k, where the base itself predicts t + 1. A head is a stack of residual blocks x + SiLU(Wx + b) and an
output layer: its own (layout "own") or the base's (layout "shared"). Medusa paper: arXiv 2401.10774, 2.1.1.

# B states   H heads   L blocks of a head   C hidden   V vocabulary   K ranks
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import fsspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

WEIGHTS = "medusa_lm_head.safetensors"  # TGI looks for no other name


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b)."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, dtype=dtype)
        # Bias too: with nn.Linear's random one an untrained head would not be the base's own prediction.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BC: Tensor) -> Tensor:
        return hidden_BC + F.silu(self.linear(hidden_BC))


class MedusaHeads(nn.ModuleList):
    """One nn.Sequential per head, so that state_dict() has the names of TGI's layout as they are.

    `{h}.{l}.linear.weight` and `{h}.{l}.linear.bias` are block l of head h, `{h}.{L}.weight` its own output
    layer. Blocks begin as the identity, so heads fresh from `init_from` repeat the base's own next token.
    """

    output_VC: Tensor | None  # layout "shared" only, from init_from

    def __init__(
        self,
        num_heads: int = 3,
        num_layers: int = 1,
        *,
        hidden_size: int,
        vocab_size: int,
        layout: Literal["own", "shared"] = "own",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_layers, self.layout = num_heads, num_layers, layout
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        for _ in range(num_heads):
            head = nn.Sequential(*(ResidualBlock(hidden_size, dtype) for _ in range(num_layers)))
            if layout == "own":
                head.append(nn.Linear(hidden_size, vocab_size, bias=False, dtype=dtype))
            self.append(head)
        self.register_buffer("output_VC", None, persistent=False)

    def init_from(self, lm_head_weight_VC: Tensor) -> None:
        """Takes over the base's output layer: a copy for each head of layout "own", else the very tensor.

        Raises ValueError when its shape is not [vocab_size, hidden_size].
        """
        if lm_head_weight_VC.shape != (self.vocab_size, self.hidden_size):
            raise ValueError(
                f"the base's output layer is {list(lm_head_weight_VC.shape)}, but the heads are made for a "
                f"vocabulary of {self.vocab_size} and a hidden size of {self.hidden_size}: another base's."
            )
        if self.layout == "shared":
            self.output_VC = lm_head_weight_VC.detach()
            return
        with torch.no_grad():
            for head in range(self.num_heads):
                self.output_weight(head).copy_(lm_head_weight_VC)

    def block(self, head: int, layer: int) -> ResidualBlock:
        return cast(ResidualBlock, cast(nn.Sequential, self[head])[layer])

    def output_weight(self, head: int) -> Tensor:
        """The output layer of a head, [V, C]. Raises ValueError before `init_from` where it is the base's."""
        if self.layout == "own":
            return cast(nn.Linear, cast(nn.Sequential, self[head])[self.num_layers]).weight
        if self.output_VC is None:
            raise ValueError("these heads share the base's output layer and lack it. Call init_from(weight).")
        return self.output_VC

    def residual_of(self, head: int, hidden_BC: Tensor) -> Tensor:
        """The states [B, C] that a head's output layer turns into logits."""
        for layer in range(self.num_layers):
            hidden_BC = self.block(head, layer)(hidden_BC)
        return hidden_BC

    def residual(self, hidden_BC: Tensor) -> Tensor:
        """The states [B, H, C] that the output layers turn into logits."""
        return torch.stack([self.residual_of(head, hidden_BC) for head in range(self.num_heads)], dim=1)

    def forward(self, hidden_BC: Tensor) -> Tensor:
        """Logits [B, H, V] of hidden states [B, C]."""
        states_BHC = self.residual(hidden_BC)
        logits = [F.linear(states_BHC[:, head], self.output_weight(head)) for head in range(self.num_heads)]
        return torch.stack(logits, dim=1)

    def stack(self) -> "HeadStack":
        """The heads as they are now, all of them in a few large matrix products: for inference."""
        on_cpu = self.output_weight(0).device.type == "cpu"
        return PackedHeadStack(self) if on_cpu else HeadStack(self)

    def save(self, folder: str | Path, base: str) -> None:
        """Writes weights and config.json as TGI reads them; the base's shared output layer is not among them.

        base: folder or hub name of the model that the heads belong to. The config has no `architectures`, by
        which TGI would take the folder for a whole model.
        """
        filesystem, path = fsspec.core.url_to_fs(str(folder))
        filesystem.makedirs(path, exist_ok=True)
        # Cloned since stacked weights are views of one storage, which safetensors refuses.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}
        filesystem.pipe_file(f"{path}/{WEIGHTS}", save(tensors, metadata={"format": "pt"}))
        config = {
            "medusa_num_heads": self.num_heads,
            "medusa_num_layers": self.num_layers,
            "base_model_name_or_path": base,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
        }
        filesystem.pipe_file(f"{path}/config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "MedusaHeads":
        """Heads from a folder or URI in TGI's layout.

        Heads, layers and layout are counted from the tensors: published configs are known to be wrong. Raises
        ValueError when the file is missing, cut short or does not hold heads of one shape.
        """
        where = f"{folder}/{WEIGHTS}"
        try:
            with fsspec.open(where, "rb") as file:
                tensors = load(file.read())
        except FileNotFoundError as error:
            raise ValueError(
                f"{where} does not exist. Give a folder that `medusa-ray train` wrote."
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"{where} is no whole safetensors file: {error}. Copy or train it again."
            ) from error
        with torch.device("meta"):  # so that a weight which the file lacks can never stay random
            heads = cls(**_shape_of(tensors, str(folder)))
        expected = {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(
                f"{where}: {wrong[0]} is {found.get(wrong[0], 'missing')}, but beside the other tensors "
                f"{expected.get(wrong[0], 'no such tensor')} was expected: these are not heads of one shape."
            )
        heads.load_state_dict(tensors, assign=True)
        return heads.to(device, dtype)


class HeadStack:
    """Weights of all heads, one tensor per layer. The heads' own become views of it: none is held twice."""

    def __init__(self, heads: MedusaHeads) -> None:
        self.num_heads, self.vocab_size = heads.num_heads, heads.vocab_size
        rows, layers = range(heads.num_heads), range(heads.num_layers)
        linears = [[heads.block(head, layer).linear for head in rows] for layer in layers]
        self.weights_HCC = [_stack([linear.weight for linear in layer]) for layer in linears]
        self.biases_HC = [_stack([linear.bias for linear in layer]) for layer in linears]
        # [V, C] when shared, else [H, V, C]
        is_shared = heads.layout == "shared"
        self.output = heads.output_weight(0) if is_shared else _stack([heads.output_weight(h) for h in rows])

    def topk(self, hidden_BC: Tensor, k: int) -> Tensor:
        """Each head's k likeliest tokens [B, H, K], likeliest first."""
        return self.logits(hidden_BC).topk(k).indices

    def logits(self, hidden_BC: Tensor) -> Tensor:
        """As MedusaHeads.forward: [B, H, V]."""
        weight_HCC, bias_HC = self.weights_HCC[0], self.biases_HC[0]
        # The first blocks all see the same states: one plain product, faster than a batched one.
        first_BX = F.linear(hidden_BC, weight_HCC.flatten(0, 1), bias_HC.flatten())
        states_HBC = (hidden_BC.unsqueeze(1) + F.silu(first_BX.unflatten(1, bias_HC.shape))).transpose(0, 1)
        for weight_HCC, bias_HC in zip(self.weights_HCC[1:], self.biases_HC[1:], strict=True):
            product_HBC = torch.baddbmm(bias_HC.unsqueeze(1), states_HBC, weight_HCC.transpose(1, 2))
            states_HBC = states_HBC + F.silu(product_HBC)
        if self.output.dim() == 2:
            return F.linear(states_HBC.transpose(0, 1), self.output)
        return torch.bmm(states_HBC, self.output.transpose(1, 2)).transpose(0, 1)


class PackedHeadStack(HeadStack):
    """The heads on a CPU: a copy in the layout of oneDNN, in bfloat16 where the processor multiplies that.

    Guesses need no precision, as the base has the last word; but their weights share the processor's cache with it.
    """

    def __init__(self, heads: MedusaHeads) -> None:
        super().__init__(heads)
        fast = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        self.dtype = fast
        self.first = _pack(self.weights_HCC[0].flatten(0, 1), self.biases_HC[0].flatten(), fast)
        self.others = [
            [_pack(weight_CC, bias_C, fast) for weight_CC, bias_C in zip(weight_HCC, bias_HC, strict=True)]
            for weight_HCC, bias_HC in zip(self.weights_HCC[1:], self.biases_HC[1:], strict=True)
        ]
        outputs = [self.output] if self.output.dim() == 2 else self.output
        self.outputs = [_pack(output_VC, None, fast) for output_VC in outputs]

    def logits(self, hidden_BC: Tensor) -> Tensor:
        hidden_BC = hidden_BC.to(self.dtype)
        first_BHC = self.first(hidden_BC).unflatten(1, self.biases_HC[0].shape)
        states_BHC = hidden_BC.unsqueeze(1) + F.silu(first_BHC)
        for layer in self.others:
            blocks = [block(states_BHC[:, head]) for head, block in enumerate(layer)]
            states_BHC = states_BHC + F.silu(torch.stack(blocks, 1))
        if len(self.outputs) == 1:
            return self.outputs[0](states_BHC)
        return torch.stack([output(states_BHC[:, head]) for head, output in enumerate(self.outputs)], 1)


def _pack(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A linear layer in oneDNN's layout, as inductor packs it: several times as fast on few rows as torch's own."""
    bias = None if bias_O is None else bias_O.to(dtype)
    weight = weight_OI.to(dtype)
    if not torch.backends.mkldnn.is_available():
        return lambda states: F.linear(states, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)  # rows: see compiled.example
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def _stack(weights: list[Tensor]) -> Tensor:
    stacked = torch.stack([weight.detach() for weight in weights])
    for weight, view in zip(weights, stacked, strict=True):
        weight.data = view
    return stacked


def _shape_of(tensors: dict[str, Tensor], folder: str) -> dict[str, Any]:
    """Arguments of MedusaHeads that fit the tensors of a file; a shared vocabulary is only in config.json."""
    first = tensors.get("0.0.linear.weight")
    if first is None or first.dim() != 2:
        raise ValueError(
            f"{folder}/{WEIGHTS} has no matrix 0.0.linear.weight, but {sorted(tensors)[:4]}: these are not "
            "heads in TGI's layout."
        )
    num_heads = len({name.split(".")[0] for name in tensors})
    num_layers = sum(name.startswith("0.") and name.endswith(".linear.weight") for name in tensors)
    shape = {"num_heads": num_heads, "num_layers": num_layers, "hidden_size": first.shape[1]}
    output = tensors.get(f"0.{num_layers}.weight")
    if output is not None:
        return {**shape, "vocab_size": output.shape[0], "layout": "own"}
    try:
        with fsspec.open(f"{folder}/config.json", "r", encoding="utf-8") as file:
            return {**shape, "vocab_size": int(json.load(file)["vocab_size"]), "layout": "shared"}
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}/config.json gives no vocab_size ({error!r}), which heads without output layers need. "
            "Write the base's vocab_size into it."
        ) from error
