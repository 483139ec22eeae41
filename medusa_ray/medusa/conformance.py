"""A base about to be served -> the shapes of its keys and values, or a ValueError that says why it cannot be served.

No list of model names decides. What a config declares is judged first, since that gives the best reason; everything
else is measured. A few tokens go through plain transformers, with the model's own eager attention and no cache, and
through the engine's attention and paged cache: as a prompt, then as a chain and as a branching tree. A model that
lives on anything else than that (a mask or window of its own, a state, the longest sequence of the batch) differs.

# B sequences   W walks   T tokens   N tree nodes   X hidden or vocab   P positions compared; of a table, pages
# H query heads   K key/value heads   E head size
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medusa_ray.medusa import attention
from medusa_ray.medusa.cache import KVShape, PagedCache
from medusa_ray.medusa.tree import Tree

if TYPE_CHECKING:
    from medusa_ray.medusa.backbone import Backbone

SERVABLE_LAYERS = {"full_attention", "sliding_attention"}
LOOK = "medusa_look"

# What the measurement runs. The second sequence takes its last prompt tokens back, so that rows differ in length.
PROMPT, CHAIN = Tree.chain(11), Tree.chain(2)
TREE = Tree.from_paths([(0,), (1,), (0, 0), (1, 0)])
WALKS = ([0, 1, 3], [0, 2, 4])  # nodes of TREE from its root to its leaves
MEASURED = [
    f"{what} of a {of}" for what in ("logits", "hidden states") for of in ("prompt and a chain", "tree")
]
NUM_KEPT = (12, 9)  # prompt tokens of each sequence when the chain comes
WINDOW = 5  # instead of a longer sliding window, which so few tokens would not reach

# Allowed difference, as a part of a vector's norm. In float32 the worst of 60 random architectures differs by 2e-6 and
# the mildest mistake in a mask by 1e-2. Attention in another order of summation rounds otherwise: at 16 bits by up to
# 5e-2 (bfloat16) and 5e-3 (float16) after 64 layers, and where that flips the choice of an expert, without bound. Hence
# at 16 bits the median over positions counts; a wrong mask or position spares few of them.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Random weights, many layers deep, can blow any rounding up to more than that. So a difference counts only if it is
# this many times what one rounding of the embeddings changes in plain transformers.
SENSITIVITY = 4


def refuse_declared(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose class or config says that it cannot be served."""
    config: Any = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise _refusal(
            model, "it is an encoder-decoder, and the engine continues prompts with a decoder alone"
        )
    if model.get_output_embeddings() is None:
        raise _refusal(
            model, "it has no output layer, so it predicts no tokens", "Load it with AutoModelForCausalLM."
        )
    strange = sorted(set(getattr(config, "layer_types", None) or []) - SERVABLE_LAYERS)
    if strange:
        raise _refusal(
            model,
            f"it has layers of type {', '.join(strange)}, and rejected guesses can be taken back from "
            f"{' and '.join(sorted(SERVABLE_LAYERS))} alone: recurrent layers keep a state of all that they have "
            "read, chunked and indexed ones do not see what a tree's mask shows them",
        )
    if not model._supports_attention_backend:
        raise _refusal(
            model,
            "it does not call transformers' attention interface (_supports_attention_backend), through "
            "which the engine works",
        )


def kv_shapes(model: PreTrainedModel) -> list[KVShape]:
    """What each layer stores of a token, seen in one dummy call: configs name it in too many ways.

    Raises ValueError for a model that does not call the attention interface once per layer with the engine's step.
    """
    seen: dict[int, KVShape] = {}
    model.set_attn_implementation(LOOK)
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with _refusing(model), torch.no_grad():
        model(input_ids=token_11, position_ids=token_11, use_cache=False, step=seen)
    if sorted(seen) != [*range(len(seen))] or not seen:
        raise _refusal(model, f"only its layers {sorted(seen)} call transformers' attention interface")
    return [seen[layer] for layer in range(len(seen))]


class _Unservable(Exception):
    """The reason, found in the middle of a forward pass."""


@contextmanager
def _refusing(model: PreTrainedModel) -> Iterator[None]:
    """Whatever a forward pass on the engine's way raises is a reason to refuse the model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _Unservable as found:
        raise _refusal(model, str(found)) from found
    except Exception as error:
        reason = f"its forward fails on the engine's way ({type(error).__name__}: {error})"
        raise _refusal(model, reason) from error


def _look(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    *_: Any,
    step: dict[int, KVShape] | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """An attention function that attends to nothing and notes the shapes in `step`."""
    name = type(module).__name__
    layer = getattr(module, "layer_idx", None)
    if step is None:
        raise _Unservable(
            f"its forward does not pass keyword arguments on to its attention function, so that {name} never "
            "learns where the cache is"
        )
    if layer is None:
        raise _Unservable(f"{name} has no layer_idx, so the cache cannot tell its layers apart")
    if layer in step:
        raise _Unservable(f"{name} attends twice in layer {layer}, and the cache has one place for a layer")
    step[layer] = KVShape(key_BKTE.shape[1], key_BKTE.shape[3], value_BKTE.shape[3])
    B, H, T, _E = query_BHTE.shape
    return value_BKTE.new_zeros(B, T, H, value_BKTE.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(LOOK, _look)


@torch.no_grad()
def compare(backbone: "Backbone") -> None:
    """Raises ValueError when the engine's way through the model gives other logits or hidden states than its own."""
    device, dtype = backbone.device, backbone.dtype
    draw = torch.Generator().manual_seed(0)
    length_B = [kept + len(CHAIN) for kept in NUM_KEPT]  # of the context, when the tree comes
    context_BT = torch.randint(backbone.vocab_size, (2, max(length_B)), generator=draw).to(device)
    node_BN = torch.randint(backbone.vocab_size, (2, len(TREE)), generator=draw).to(device)
    chain_BN = torch.stack([context_BT[row, kept:][: len(CHAIN)] for row, kept in enumerate(NUM_KEPT)])
    # Plain transformers knows no trees: each walk is a text of its own. The shorter sequence is filled up behind its
    # walk, where a causal model does not look.
    walk_WT = torch.stack(
        [
            torch.cat([context_BT[row, :length], node_BN[row, walk], context_BT[row, length:]])
            for row, length in enumerate(length_B)
            for walk in WALKS
        ]
    )
    cache = PagedCache(backbone.kv_shapes, 2, dtype, device)
    table_BP = cache.page_table([cache.take(1), cache.take(1)], 1)

    def run(token_BN: Tensor, length_B: Sequence[int], tree: Tree) -> tuple[Tensor, Tensor]:
        tree = tree.to(device)
        cached_B = torch.tensor(length_B, device=device)
        step = attention.tree_step(cached_B, table_BP, tree.depth_N, tree.mask_NN, cache.keys, cache.values)
        return backbone.forward(token_BN, step, torch.arange(len(tree), device=device).expand(2, -1))

    with _short_windows(backbone.model) as cut:
        plain = _measured_of_walks(backbone.plain_forward(walk_WT), length_B)
        with _refusing(backbone.model):
            prompt = run(context_BT[:, : len(PROMPT)], [0, 0], PROMPT)
            chain = run(chain_BN, NUM_KEPT, CHAIN)
            tree = run(node_BN, length_B, TREE)
        ours = []
        for prompt_BNX, chain_BNX, tree_BNX in zip(prompt, chain, tree, strict=True):
            ours += [torch.cat([prompt_BNX[0, -1:], chain_BNX.flatten(0, 1)]), tree_BNX.flatten(0, 1)]
        differences = [_difference(*pair, dtype) for pair in zip(ours, plain, strict=True)]
        tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        if all(difference <= tolerance for difference in differences):
            return
        with _nudged_embeddings(backbone.model):
            nudged = _measured_of_walks(backbone.plain_forward(walk_WT), length_B)
    noises = [_difference(*pair, dtype) for pair in zip(nudged, plain, strict=True)]
    for what, difference, noise in zip(MEASURED, differences, noises, strict=True):
        if not difference <= max(tolerance, SENSITIVITY * noise):  # a NaN too
            raise _refusal(
                backbone.model,
                f"the {what} differ from plain transformers' by {difference:.1g} of their size, where {tolerance:g} is "
                f"allowed in {dtype}{cut}. It uses something that the engine's attention is not given, such as a mask, "
                "a window or a state of its own",
            )


def _measured_of_walks(plain: tuple[Tensor, Tensor], length_B: Sequence[int]) -> list[Tensor]:
    """What is MEASURED, [P, X] each, out of the logits and hidden states [W, T, X] of the walks."""
    walk_N = torch.tensor([0, 0, 1, 0, 1])  # one that goes through the node; a chain's nodes are in both

    def at_nodes(plain_WTX: Tensor, length_B: Sequence[int], tree: Tree) -> list[Tensor]:
        return [
            plain_WTX[row * len(WALKS) + walk_N[: len(tree)], length + tree.depth_N]
            for row, length in enumerate(length_B)
        ]

    measured = []
    for plain_WTX in plain:
        end_of_prompt_1X = plain_WTX[0, len(PROMPT) - 1][None]
        measured.append(torch.cat([end_of_prompt_1X, *at_nodes(plain_WTX, NUM_KEPT, CHAIN)]))
        measured.append(torch.cat(at_nodes(plain_WTX, length_B, TREE)))
    return measured


def _difference(ours_PX: Tensor, plain_PX: Tensor, dtype: torch.dtype) -> float:
    """Of the vector at the worst position, of a 16-bit model at the median one, as a part of its norm."""
    ours_PX, plain_PX = ours_PX.float(), plain_PX.float()
    part_P = (ours_PX - plain_PX).norm(dim=-1) / plain_PX.norm(dim=-1)
    return (part_P.median() if dtype.itemsize < 4 else part_P.max()).item()


@contextmanager
def _nudged_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Embeddings as another rounding might have left them."""

    def nudge(module: nn.Module, args: Any, embedding_BTC: Tensor) -> Tensor:
        noise_BTC = torch.randn(embedding_BTC.shape, generator=torch.Generator().manual_seed(0))
        unit = torch.finfo(embedding_BTC.dtype).eps
        return embedding_BTC * (1 + unit * noise_BTC).to(embedding_BTC)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[str]:
    """Cuts sliding windows to WINDOW tokens for a while, in the config, which plain transformers reads, and in the
    layers, which tell the engine. Says so."""
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or not WINDOW < window < config.max_position_embeddings:
        yield ""
        return
    holders = [
        (h, h.sliding_window)
        for h in (config, *model.modules())
        if isinstance(getattr(h, "sliding_window", None), int)
    ]
    try:
        for holder, size in holders:
            holder.sliding_window = size - window + WINDOW
        yield f" (with its sliding window of {window} cut to {WINDOW})"
    finally:
        for holder, size in holders:
            holder.sliding_window = size


def rope_limit(model: PreTrainedModel) -> int | None:
    """The length up to which RoPE's frequencies stand still, where they follow the longest sequence of the batch."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for of_layers in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        kind = of_layers.get("rope_type", "") if isinstance(of_layers, dict) else ""
        if kind == "longrope":
            limits.append(of_layers["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def _refusal(
    model: PreTrainedModel, reason: str, what_to_do: str = "Serve it with transformers' own generate."
) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be served: {reason}. {what_to_do}")
