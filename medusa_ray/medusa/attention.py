"""The attention function that every transformers model calls while the engine runs it.

It owns the cache's writes and reads, so the model needs no cache object of its own, and it applies the tree's mask.
A step's tables travel to it as the keyword argument `step` of the model's forward. On a GPU the nodes of a tree read
the pages through the kernel of kernels.py, in a CPU's compiled pass through that of page_attention.cpp; all else is the
dense reference, on torch's scaled dot product attention, with grouped query heads folded into the query length.

# B sequences   T tokens of a step, N where they are tree nodes   P pages   S slots read
# H query heads   K key/value heads   G = H / K   E head size
"""

import importlib.util
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medusa_ray.medusa import page_attention
from medusa_ray.medusa.cache import PAGE_SIZE, all_slots, read, slots, write
from medusa_ray.medusa.tree import MASK_BITS, ancestor_bits

NAME = "medusa_tree"
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch: its kernels then run on any device, one program after another.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
is_kernel_trusted = True  # until a base gives other logits with it than without

log = logging.getLogger("medusa_ray")


@dataclass(frozen=True)
class TreeTables:
    """Where a kernel finds a tree's nodes, and who sees whom."""

    table_BP: Tensor  # pages of each sequence
    length_B: Tensor  # tokens of the context; the nodes stand behind it, in their order
    depth_T: Tensor
    sees_T: Tensor  # on a GPU int64, bit a: the node sees node a; on a CPU bool [T, T]
    cpu_threads: int | None = None


@dataclass
class Step:
    """Where one forward pass writes and reads, and who sees whom. `tree` is for a kernel, else the dense tables."""

    keys: list[Tensor]  # a pool per layer
    values: list[Tensor]
    write_BT: Tensor  # slots of the step's own tokens
    position_BT: Tensor
    read_BS: Tensor | None = None  # slots of the context and the step's own tokens
    visible_BTS: Tensor | None = None  # bool
    position_BS: Tensor | None = None  # of what lies in each slot, for sliding windows
    tree: TreeTables | None = None
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, num_groups: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, G * T, S], to be added to the scores; built once per step for each kind of layer."""
        if (window, num_groups) not in self.masks:
            visible_BTS = self.visible_BTS
            assert visible_BTS is not None
            if window is not None:
                assert self.position_BS is not None
                near_BTS = self.position_BT[..., None] - self.position_BS[:, None] < window
                visible_BTS = visible_BTS & near_BTS
            mask_BTS = torch.zeros_like(visible_BTS, dtype=dtype).masked_fill(~visible_BTS, -torch.inf)
            self.masks[window, num_groups] = mask_BTS.repeat(1, num_groups, 1)[:, None]
        return self.masks[window, num_groups]


def takes_kernel(device: torch.device, num_nodes: int) -> bool:
    """Whether trees of so many nodes are read by the kernel there: on a GPU beside which triton is installed."""
    can_run = HAS_TRITON and is_kernel_trusted and (device.type == "cuda" or IS_INTERPRETED)
    return can_run and num_nodes <= MASK_BITS


def distrust_kernel(reason: Exception) -> None:
    """Has this process do without the kernel from now on: a slow GPU is better than none."""
    global is_kernel_trusted
    is_kernel_trusted = False
    log.warning("trees are verified without the GPU's own kernel, which fails here: %s", reason)


def tree_step(
    length_B: Tensor,
    table_BP: Tensor,
    depth_N: Tensor,
    mask_NN: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    cpu_threads: int | None = None,
) -> Step:
    """Nodes stand behind the context, in their order; each sees the context, its ancestors and itself.

    cpu_threads: of the CPU's own kernel, which compiled code alone can call; None for the dense reference.
    """
    num_nodes = depth_N.shape[0]  # and not len(), which a compiled pass would take for a constant
    node_BN = length_B[:, None] + torch.arange(num_nodes, device=table_BP.device)
    position_BN = length_B[:, None] + depth_N
    if takes_kernel(table_BP.device, num_nodes):
        tables = TreeTables(table_BP, length_B, depth_N, ancestor_bits(mask_NN))
        return Step(keys, values, slots(table_BP, node_BN), position_BN, tree=tables)
    read_BS = all_slots(table_BP)
    slot_S = torch.arange(read_BS.shape[1], device=read_BS.device)
    behind_BS = slot_S - length_B[:, None]  # negative in the context, else the node that stands there
    is_node_BS = (behind_BS >= 0) & (behind_BS < num_nodes)
    inner_BS = behind_BS.clamp(0, num_nodes - 1)
    among_nodes_BNS = mask_NN.T[inner_BS].transpose(1, 2) & is_node_BS[:, None]
    return Step(
        keys,
        values,
        write_BT=read_BS.gather(1, node_BN),
        read_BS=read_BS,
        visible_BTS=(behind_BS < 0)[:, None] | among_nodes_BNS,
        position_BT=position_BN,
        position_BS=torch.where(is_node_BS, length_B[:, None] + depth_N[inner_BS], slot_S),
        # Beside the dense tables, since layers differ: a compiler drops what no layer has used.
        tree=TreeTables(table_BP, length_B, depth_N, mask_NN, cpu_threads) if cpu_threads else None,
    )


def attend(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls: returns [B, T, H, E] and no attention weights.

    softcap is Gemma 2's, s_aux gpt-oss's sinks.
    """
    assert step is not None, "the model does not pass keyword arguments on to its attention function"
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of transformers has one
    write(step.keys[layer], step.write_BT, key_BKTE.transpose(1, 2))
    write(step.values[layer], step.write_BT, value_BKTE.transpose(1, 2))
    B, H, T, E = query_BHTE.shape
    scale = E**-0.5 if scaling is None else scaling
    pools, tree = (step.keys[layer], step.values[layer]), step.tree
    if tree is not None and tree.cpu_threads is None:
        return _attend_pages(query_BHTE, pools, tree, scale, sliding_window, softcap, s_aux), None
    if tree is not None and softcap is None and s_aux is None and page_attention.takes(query_BHTE, pools[1]):
        tables = tree.table_BP, tree.length_B, tree.sees_T, tree.depth_T
        window, threads = sliding_window or 0, tree.cpu_threads
        return page_attention.attend(query_BHTE, *pools, *tables, scale, window, threads), None

    assert step.read_BS is not None
    keys_BKSE = read(step.keys[layer], step.read_BS).transpose(1, 2)
    values_BKSE = read(step.values[layer], step.read_BS).transpose(1, 2)

    K = key_BKTE.shape[1]
    query_BKQE = query_BHTE.reshape(B, K, H // K * T, E)
    mask = step.mask(sliding_window, H // K, query_BHTE.dtype)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(query_BKQE, keys_BKSE, values_BKSE, attn_mask=mask, scale=scale)
    else:
        out = _soft_attention(query_BKQE, keys_BKSE, values_BKSE, mask, scale, softcap, s_aux)
    out_BTKGE = out.unflatten(2, (H // K, T)).permute(0, 3, 1, 2, 4)
    # A clone, where contiguous() would first ask for strides that a compiled pass cannot know.
    return out_BTKGE.clone(memory_format=torch.contiguous_format).flatten(2, 3), None


def _attend_pages(
    query_BHTE: Tensor,
    pools: tuple[Tensor, Tensor],
    tree: TreeTables,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    from medusa_ray.medusa.kernels import tree_attention  # needs triton, which not every machine has

    tables = (tree.table_BP, tree.length_B, tree.sees_T, tree.depth_T)
    query_BTHE = query_BHTE.transpose(1, 2)
    return tree_attention(query_BTHE, *pools, *tables, PAGE_SIZE, scale, window, softcap, sink_H)


def _soft_attention(
    query_BKQE: Tensor,
    keys_BKSE: Tensor,
    values_BKSE: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Attention with a soft cap on its scores or a sink beside them, in float32."""
    scores_BKQS = (query_BKQE @ keys_BKSE.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores_BKQS = torch.tanh(scores_BKQS / softcap) * softcap
    scores_BKQS = scores_BKQS + mask
    num_slots = scores_BKQS.shape[-1]
    if sink_H is not None:
        B, K, Q, _ = scores_BKQS.shape
        groups = sink_H.numel() // K
        sink = sink_H.float().view(1, K, groups, 1).expand(B, K, groups, Q // groups).reshape(B, K, Q, 1)
        scores_BKQS = torch.cat([scores_BKQS, sink], -1)
    return scores_BKQS.softmax(-1)[..., :num_slots].to(values_BKSE.dtype) @ values_BKSE


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
