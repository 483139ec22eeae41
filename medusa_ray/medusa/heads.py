"""Hidden states of the base -> guesses of the tokens after the next one.

Head k (from 0) sees the base's last hidden state at position t, after the final norm, and guesses token
t + 2 + k, where the base itself predicts t + 1. A head is a stack of residual blocks x + SiLU(Wx + b) and an
output layer: its own (layout "own"), the base's ("shared"), or the base's and a low-rank term that is the head's own
("lowrank": LoRA, arXiv 2106.09685, section 4.1, on the output layer). Medusa paper: arXiv 2401.10774, 2.1.1.

With any layout, a token map limits the guesses to some tokens of the vocabulary, and output layers to their rows: most
of what a head costs is a large output layer, and most text is few tokens. The base still knows all tokens and has the
last word, so that replies stay the same. FR-Spec, arXiv 2502.14856, ranks tokens by frequency as `train` does; the map
is EAGLE-3's `d2t` (arXiv 2503.01840, in its published code and checkpoints), with ids where that has offsets.

# B states   H heads   L blocks of a head   C hidden   R rank   V vocabulary   K ranks
# M draft vocabulary: the tokens that heads guess, all V without a token map
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import fsspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa_ray.medusa import tensors as files

log = logging.getLogger("medusa_ray")

WEIGHTS = "medusa_lm_head.safetensors"  # TGI looks for no other name
# Of heads that TGI would take for others: it finds none, where it would serve low-rank ones as shared.
EXTENDED_WEIGHTS = "medusa_heads.safetensors"

Layout = Literal["own", "shared", "lowrank"]


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


class LowRankTerm(nn.Module):
    """B(Ax), with x [B, C] and the result [B, M]: what a head of layout "lowrank" adds to the base's logits."""

    def __init__(self, hidden_size: int, rank: int, num_tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, num_tokens, bias=False, dtype=dtype)
        nn.init.zeros_(self.up.weight)  # only one of them, or neither would ever get a gradient

    def forward(self, states_BC: Tensor) -> Tensor:
        return self.up(self.down(states_BC))


class MedusaHeads(nn.ModuleList):
    """One nn.Sequential per head, so that state_dict() has the names of TGI's layout as they are.

    `{h}.{l}.linear.weight` and `{h}.{l}.linear.bias` are block l of head h, `{h}.{L}.weight` its own output
    layer. TGI knows neither `{h}.{L}.down.weight` and `{h}.{L}.up.weight`, of a low-rank term, nor `token_map_M`.
    Blocks begin as the identity, so heads fresh from `init_from` repeat the base's own next token.
    """

    output_MC: Tensor | None  # what the base shares, from init_from
    token_map_M: Tensor | None  # the base's id of each token that heads guess, rising

    def __init__(
        self,
        num_heads: int = 3,
        num_layers: int = 1,
        *,
        hidden_size: int,
        vocab_size: int,
        layout: Layout = "own",
        rank: int = 64,
        token_map_M: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """vocab_size: the base's. rank: of layout "lowrank". token_map_M: ids of the tokens that are guessed, int64.

        Raises ValueError when the token map does not rise within 0 ... vocab_size - 1.
        """
        super().__init__()
        if token_map_M is not None:
            _check_token_map(token_map_M, vocab_size)
        self.num_heads, self.num_layers, self.layout, self.rank = num_heads, num_layers, layout, rank
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.draft_vocab_size = vocab_size if token_map_M is None else len(token_map_M)
        for _ in range(num_heads):
            head = nn.Sequential(*(ResidualBlock(hidden_size, dtype) for _ in range(num_layers)))
            if layout == "own":
                head.append(nn.Linear(hidden_size, self.draft_vocab_size, bias=False, dtype=dtype))
            elif layout == "lowrank":
                head.append(LowRankTerm(hidden_size, rank, self.draft_vocab_size, dtype))
            self.append(head)
        self.register_buffer("output_MC", None, persistent=False)
        self.register_buffer("token_map_M", token_map_M)

    def init_from(self, lm_head_weight_VC: Tensor) -> None:
        """Takes over the base's output layer, or those rows of it that the token map names.

        Each head of layout "own" gets a copy; what is shared is the very tensor unless there is a token map. Raises
        ValueError when the shape is not [vocab_size, hidden_size].
        """
        if lm_head_weight_VC.shape != (self.vocab_size, self.hidden_size):
            raise ValueError(
                f"the base's output layer is {list(lm_head_weight_VC.shape)}, but the heads are made for a "
                f"vocabulary of {self.vocab_size} and a hidden size of {self.hidden_size}: another base's."
            )
        output_MC = lm_head_weight_VC.detach()
        if self.token_map_M is not None:
            output_MC = output_MC[self.token_map_M]
        if self.shares_output:
            self.output_MC = output_MC
            return
        with torch.no_grad():
            for head in range(self.num_heads):
                self.output_weight(head).copy_(output_MC)

    @property
    def shares_output(self) -> bool:
        """Whether the heads need the base's output layer, by `init_from`, each time that they are loaded."""
        return self.layout != "own"

    def block(self, head: int, layer: int) -> ResidualBlock:
        return cast(ResidualBlock, cast(nn.Sequential, self[head])[layer])

    def output_weight(self, head: int) -> Tensor:
        """The output layer of a head, [M, C]. Raises ValueError before `init_from` where it is the base's."""
        if self.layout == "own":
            return cast(nn.Linear, cast(nn.Sequential, self[head])[self.num_layers]).weight
        if self.output_MC is None:
            raise ValueError("these heads share the base's output layer and lack it. Call init_from(weight).")
        return self.output_MC

    def low_rank_term(self, head: int) -> LowRankTerm:
        """Of layout "lowrank" only."""
        return cast(LowRankTerm, cast(nn.Sequential, self[head])[self.num_layers])

    def logits_of(self, head: int, states_BC: Tensor) -> Tensor:
        """Logits [B, M] of a head from the states that its `residual_of` gave."""
        logits_BM = F.linear(states_BC, self.output_weight(head))
        return logits_BM + self.low_rank_term(head)(states_BC) if self.layout == "lowrank" else logits_BM

    def residual_of(self, head: int, hidden_BC: Tensor) -> Tensor:
        """The states [B, C] that a head's output layer turns into logits."""
        for layer in range(self.num_layers):
            hidden_BC = self.block(head, layer)(hidden_BC)
        return hidden_BC

    def residual(self, hidden_BC: Tensor) -> Tensor:
        """The states [B, H, C] that the output layers turn into logits."""
        return torch.stack([self.residual_of(head, hidden_BC) for head in range(self.num_heads)], dim=1)

    def forward(self, hidden_BC: Tensor) -> Tensor:
        """Logits [B, H, M] of hidden states [B, C]."""
        states_BHC = self.residual(hidden_BC)
        return torch.stack(
            [self.logits_of(head, states_BHC[:, head]) for head in range(self.num_heads)], dim=1
        )

    def stack(self) -> "HeadStack":
        """The heads as they are now, all of them in a few large matrix products: for inference."""
        on_cpu = self.output_weight(0).device.type == "cpu"
        return PackedHeadStack(self) if on_cpu else HeadStack(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.block(0, 0).linear.weight.dtype

    @property
    def fits_tgi(self) -> bool:
        """Whether TGI's loaders read these heads as what they are: MedusaHeadV1, or MedusaHeadV2 of one block."""
        return self.token_map_M is None and (
            self.layout == "own" or (self.layout == "shared" and self.num_layers == 1)
        )

    def config(self, base: str) -> dict[str, Any]:
        """What config.json says. base: folder or hub name of the model that the heads belong to.

        It has no `architectures`, by which TGI would take the folder for a whole model.
        """
        return {
            "medusa_num_heads": self.num_heads,
            "medusa_num_layers": self.num_layers,
            "base_model_name_or_path": base,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
        }

    def save(self, folder: str | Path, base: str) -> None:
        """Writes weights and config.json, as TGI reads them wherever it can hold the heads.

        The base's shared output layer is not among them.
        """
        filesystem, path = fsspec.core.url_to_fs(str(folder))
        filesystem.makedirs(path, exist_ok=True)
        name, other = (WEIGHTS, EXTENDED_WEIGHTS) if self.fits_tgi else (EXTENDED_WEIGHTS, WEIGHTS)
        files.write(f"{folder}/{name}", self.state_dict())
        if filesystem.exists(f"{path}/{other}"):  # of heads that were here before
            filesystem.rm(f"{path}/{other}")
        filesystem.pipe_file(f"{path}/config.json", (json.dumps(self.config(base), indent=2) + "\n").encode())

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
    ) -> "MedusaHeads":
        """Heads from a folder or URI in our layout, which is TGI's where that can hold them.

        Heads, layers, rank and layout are counted from the tensors: published configs are known to be wrong. Only the
        base's vocabulary can be missing there. dtype: as stored when None. Raises ValueError when the file is missing,
        cut short, or does not hold finite weights of heads of one shape.
        """
        where, tensors = _read(str(folder))
        try:
            config = files.read_json(f"{folder}/config.json")
        except FileNotFoundError:
            config = {}
        vocab_size = config.get("vocab_size")
        heads = cls.of(tensors, vocab_size if type(vocab_size) is int else None, where).to(device, dtype)
        if (said := config.get("medusa_num_heads", heads.num_heads)) != heads.num_heads:
            log.warning(
                "%s/config.json says %s heads, but the tensors are %d: taken as %d.",
                folder,
                said,
                heads.num_heads,
                heads.num_heads,
            )
        files.check_finite(heads.state_dict(), where)
        return heads

    @classmethod
    def of(
        cls, tensors: dict[str, Tensor], vocab_size: int | None = None, where: str = "the heads"
    ) -> "MedusaHeads":
        """Heads of these very tensors, by our names.

        vocab_size: the base's, where the tensors do not show it. where: they come from, for messages. Raises ValueError
        when they are not heads of one shape.
        """
        with torch.device("meta"):  # so that a weight which the file lacks can never stay random
            heads = cls(**_shape_of(tensors, vocab_size, where))
        expected = {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(
                f"{where}: {wrong[0]} is {found.get(wrong[0], 'missing')}, but beside the other tensors "
                f"{expected.get(wrong[0], 'no such tensor')} was expected: these are not heads of one shape."
            )
        heads.load_state_dict(tensors, assign=True)
        return heads


class HeadStack:
    """Weights of all heads, one tensor per layer. The heads' own become views of it: none is held twice."""

    def __init__(self, heads: MedusaHeads) -> None:
        self.num_heads, self.draft_vocab_size = heads.num_heads, heads.draft_vocab_size
        self.token_map_M = heads.token_map_M
        rows, layers = range(heads.num_heads), range(heads.num_layers)
        linears = [[heads.block(head, layer).linear for head in rows] for layer in layers]
        self.weights_HCC = [_stack([linear.weight for linear in layer]) for layer in linears]
        self.biases_HC = [_stack([linear.bias for linear in layer]) for layer in linears]
        # [M, C] when shared, else [H, M, C]
        shares = heads.shares_output
        self.output = heads.output_weight(0) if shares else _stack([heads.output_weight(h) for h in rows])
        self.down_HRC = self.up_HMR = None
        if heads.layout == "lowrank":
            terms = [heads.low_rank_term(head) for head in rows]
            self.down_HRC = _stack([term.down.weight for term in terms])
            self.up_HMR = _stack([term.up.weight for term in terms])

    def topk(self, hidden_BC: Tensor, k: int) -> Tensor:
        """Each head's k likeliest tokens [B, H, K] by the base's ids, likeliest first; k is at most M."""
        place_BHK = self.logits(hidden_BC).topk(k).indices
        return place_BHK if self.token_map_M is None else self.token_map_M[place_BHK]

    def logits(self, hidden_BC: Tensor) -> Tensor:
        """As MedusaHeads.forward: [B, H, M]."""
        weight_HCC, bias_HC = self.weights_HCC[0], self.biases_HC[0]
        # The first blocks all see the same states: one plain product, faster than a batched one.
        first_BX = F.linear(hidden_BC, weight_HCC.flatten(0, 1), bias_HC.flatten())
        states_HBC = (hidden_BC.unsqueeze(1) + F.silu(first_BX.unflatten(1, bias_HC.shape))).transpose(0, 1)
        for weight_HCC, bias_HC in zip(self.weights_HCC[1:], self.biases_HC[1:], strict=True):
            product_HBC = torch.baddbmm(bias_HC.unsqueeze(1), states_HBC, weight_HCC.transpose(1, 2))
            states_HBC = states_HBC + F.silu(product_HBC)
        if self.output.dim() == 3:
            return torch.bmm(states_HBC, self.output.transpose(1, 2)).transpose(0, 1)
        states_BHC = states_HBC.transpose(0, 1)
        return self._with_terms(F.linear(states_BHC, self.output), states_BHC)

    def _with_terms(self, logits_BHM: Tensor, states_BHC: Tensor) -> Tensor:
        """Adds the low-rank terms, if there are any, to the logits that the base's output layer gave."""
        if self.down_HRC is None or self.up_HMR is None:
            return logits_BHM
        low_HBR = torch.bmm(states_BHC.transpose(0, 1), self.down_HRC.transpose(1, 2))
        return torch.baddbmm(logits_BHM.transpose(0, 1), low_HBR, self.up_HMR.transpose(1, 2)).transpose(0, 1)


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
        self.outputs = [_pack(output_MC, None, fast) for output_MC in outputs]
        if self.down_HRC is not None and self.up_HMR is not None:  # so thin that packing them gains nothing
            self.down_HRC, self.up_HMR = self.down_HRC.to(fast), self.up_HMR.to(fast)

    def logits(self, hidden_BC: Tensor) -> Tensor:
        hidden_BC = hidden_BC.to(self.dtype)
        first_BHC = self.first(hidden_BC).unflatten(1, self.biases_HC[0].shape)
        states_BHC = hidden_BC.unsqueeze(1) + F.silu(first_BHC)
        for layer in self.others:
            blocks = [block(states_BHC[:, head]) for head, block in enumerate(layer)]
            states_BHC = states_BHC + F.silu(torch.stack(blocks, 1))
        if len(self.outputs) == 1:
            return self._with_terms(self.outputs[0](states_BHC), states_BHC)
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


def _read(folder: str) -> tuple[str, dict[str, Tensor]]:
    """The file that holds the heads, and its tensors."""
    for name in (WEIGHTS, EXTENDED_WEIGHTS):
        try:
            return f"{folder}/{name}", files.read(f"{folder}/{name}")
        except FileNotFoundError:
            continue
    raise ValueError(
        f"{folder}/{WEIGHTS} does not exist. Give a folder that `medusa-ray train` or `medusa-ray import` wrote."
    )


def _check_token_map(token_map_M: Tensor, vocab_size: int) -> None:
    if token_map_M.dtype != torch.int64 or token_map_M.dim() != 1 or not len(token_map_M):
        raise ValueError(
            f"token_map_M is {token_map_M.dtype} {list(token_map_M.shape)}, but a list of token ids was expected, "
            "torch.int64 [M]."
        )
    for token in (token_map_M.min().item(), token_map_M.max().item()):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token_map_M has the token id {token}, outside 0 ... {vocab_size - 1}.")
    if len(wrong := (token_map_M.diff() <= 0).nonzero()):
        pair = token_map_M[wrong[0, 0] :][:2].tolist()
        raise ValueError(
            f"token_map_M has {pair[1]} after {pair[0]}, but its ids must rise, so that each token is there once."
        )


def _shape_of(tensors: dict[str, Tensor], vocab_size: int | None, where: str) -> dict[str, Any]:
    """Arguments of MedusaHeads that fit the tensors."""
    if "0.0.linear.weight" not in tensors:
        raise ValueError(
            f"{where} has no matrix 0.0.linear.weight, but {sorted(tensors)[:4]}: these are not heads in our layout. "
            "`medusa-ray import` reads others."
        )
    token_map_M = tensors.get("token_map_M")
    weights = {name: tensor for name, tensor in tensors.items() if name != "token_map_M"}
    for name, tensor in weights.items():
        num_dimensions = 1 if name.endswith(".bias") else 2
        if not tensor.is_floating_point() or tensor.dim() != num_dimensions or not tensor.numel():
            raise ValueError(
                f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, but floating-point numbers in "
                f"{num_dimensions} dimension(s) were expected."
            )
    num_layers = sum(name.startswith("0.") and name.endswith(".linear.weight") for name in weights)
    shape: dict[str, Any] = {
        "num_heads": len({name.split(".")[0] for name in weights}),
        "num_layers": num_layers,
        "hidden_size": weights["0.0.linear.weight"].shape[1],
        "token_map_M": token_map_M,
    }
    output, up = weights.get(f"0.{num_layers}.weight"), weights.get(f"0.{num_layers}.up.weight")
    if output is not None:
        shape |= {"layout": "own", "vocab_size": output.shape[0]}
    elif up is not None:
        shape |= {"layout": "lowrank", "vocab_size": up.shape[0], "rank": up.shape[1]}
    else:
        shape |= {"layout": "shared"}
    if token_map_M is None and "vocab_size" in shape:
        return shape
    if vocab_size is None:
        raise ValueError(
            f"{where} does not show how many tokens the base has, and config.json gives no vocab_size, which heads "
            "without output layers, or with a token map, need. Write the base's vocab_size into it."
        )
    return shape | {"vocab_size": vocab_size}
