"""A pass of the base -> the same pass by several processes, each with a shard of every layer and of the cache.

The leader, rank 0, has the engine: heads, acceptance and scheduling. It tells the followers the arguments of each pass,
and all run it at once: transformers' tensor-parallel plan sums within the layers and gathers the logits. Whatever is
not summed each computes for itself, greedy walks too, so they have to run on processors of one kind.

# B sequences   N tree nodes   W nodes wanted   D tokens of a walk   P pages
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PagedCache, compact
from medusa_ray.medusa.treepass import TreePass

CACHE, PASS, COMPACT = range(3)  # what a message is about
NUM_SIZES = 5
IDLE = timedelta(days=365)  # followers of an engine without requests wait for as long as it takes


@dataclass(frozen=True)
class Shards:
    """One process's place among those that share a base."""

    rank: int
    num: int
    control: (
        dist.ProcessGroup
    )  # of messages' sizes, which the host must know, while tensors stay on their device

    @classmethod
    def join(cls, store: dist.Store, rank: int, num: int, timeout_s: float = 1800) -> "Shards":
        """Returns when all have come. timeout_s: for them to come, and for each sum of a pass."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num, timeout=timeout)
        return cls(rank, num, dist.new_group(backend="gloo", timeout=IDLE))

    def tell(self, about: int, sizes: Sequence[int], tensors: Sequence[Tensor] = ()) -> None:
        """The leader's side of `hear`."""
        header = torch.tensor([about, *sizes, *[0] * (NUM_SIZES - len(sizes))])
        dist.broadcast(header, 0, group=self.control)
        if tensors:
            dist.broadcast(torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors]), 0)

    def hear(self) -> tuple[int, list[int]]:
        """Blocks until the leader tells something: what about, and sizes. Raises RuntimeError when it has gone."""
        header = torch.empty(1 + NUM_SIZES, dtype=torch.long)
        dist.broadcast(header, 0, group=self.control)
        about, *sizes = header.tolist()
        return about, sizes

    def hear_tensors(
        self, shapes: Sequence[tuple[int, ...]], flags: Sequence[tuple[int, ...]], device: torch.device
    ) -> list[Tensor]:
        """What `tell` was given: int64 tensors of these shapes, then bool ones, which so leave the first aligned."""
        bounds = [8 * torch.Size(shape).numel() for shape in shapes] + [
            torch.Size(shape).numel() for shape in flags
        ]
        packed = torch.empty(sum(bounds), dtype=torch.uint8, device=device)
        dist.broadcast(packed, 0)
        dtypes = [torch.long] * len(shapes) + [torch.bool] * len(flags)
        parts = zip(packed.split(bounds), dtypes, [*shapes, *flags], strict=True)
        return [part.view(dtype).view(shape) for part, dtype, shape in parts]


class ShardedPass:
    """The leader's pass, called as TreePass is; a failed follower fails the call with RuntimeError."""

    def __init__(self, backbone: Backbone, cache: PagedCache, shards: Shards) -> None:
        self._pass, self._shards = TreePass(backbone), shards
        shards.tell(CACHE, [cache.num_pages])

    def __call__(
        self,
        token_BN: Tensor,
        length_B: Tensor,
        table_BP: Tensor,
        depth_N: Tensor,
        mask_NN: Tensor,
        wanted_BW: Tensor,
        depth_W: Tensor,
        mask_WW: Tensor,
        parent_W: Tensor,
        walk_WD: Tensor,
        is_greedy: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """As TreePass.forward."""
        sizes = [*token_BN.shape, table_BP.shape[1], *walk_WD.shape]
        numbers = [token_BN, length_B, table_BP, depth_N, wanted_BW, depth_W, parent_W, walk_WD]
        self._shards.tell(PASS, sizes, [*numbers, mask_NN, mask_WW, is_greedy])
        nodes = depth_N, mask_NN, wanted_BW, depth_W, mask_WW, parent_W, walk_WD
        return self._pass(token_BN, length_B, table_BP, *nodes, is_greedy, keys, values)

    def compact(
        self, keys: list[Tensor], values: list[Tensor], table_BP: Tensor, length_B: Tensor, walk_BD: Tensor
    ) -> None:
        """As cache.compact."""
        self._shards.tell(COMPACT, [*table_BP.shape, walk_BD.shape[1]], [table_BP, length_B, walk_BD])
        compact(keys, values, table_BP, length_B, walk_BD)


@torch.inference_mode()
def follow(backbone: Backbone, shards: Shards) -> NoReturn:
    """Does what the leader does, for ever. Raises RuntimeError when the leader or another follower has gone."""
    run, device = TreePass(backbone), backbone.device
    cache = PagedCache(backbone.kv_shapes, 0, backbone.dtype, device)
    while True:
        about, sizes = shards.hear()
        if about == CACHE:
            cache = PagedCache(backbone.kv_shapes, sizes[0], backbone.dtype, device)
        elif about == PASS:
            B, N, P, W, D = sizes
            token_BN, length_B, table_BP, depth_N, wanted_BW, *shape, mask_NN, mask_WW, is_greedy = (
                shards.hear_tensors(
                    [(B, N), (B,), (B, P), (N,), (B, W), (W,), (W,), (W, D)], [(N, N), (W, W), ()], device
                )
            )
            depth_W, parent_W, walk_WD = shape
            nodes = depth_N, mask_NN, wanted_BW, depth_W, mask_WW, parent_W, walk_WD
            run(token_BN, length_B, table_BP, *nodes, is_greedy, cache.keys, cache.values)
        else:
            B, P, D, *_ = sizes
            table_BP, length_B, walk_BD = shards.hear_tensors([(B, P), (B,), (B, D)], [], device)
            compact(cache.keys, cache.values, table_BP, length_B, walk_BD)
