"""A step's queries and the paged cache -> its attention on a GPU, read straight from the pages: Triton.

One kernel serves every number of nodes, the baseline's single one included. A program takes one key/value head of one
sequence and folds the nodes and the query heads that share it into the rows of a tile, so keys are read once for all
of them. The context is cut into splits, since a short batch alone would leave most of the GPU idle; a second kernel
merges them. Lengths are read on the device: the same launch, and so the same CUDA graph, serves any context.

# B sequences   T nodes of a step   P pages of a sequence   L slots of the pool   H query heads   K key/value heads
# E size of a query and key   U size of a value   S splits   M rows of a tile, H / K for each node   N slots of a tile
# R queries of a merge
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_ray.medusa.tree import MASK_BITS

# Two tiles of keys and of values in flight and one of queries are then 80 KiB, which every GPU since Ampere has.
TILE_BYTES = 16 * 1024
MAX_TILE_ROWS = 64
MIN_TILE_ROWS = 16  # what tensor cores take
WANTED_PROGRAMS = 264  # two for each multiprocessor of an H100
MIN_SPLIT_PAGES = 2
MAX_SPLITS = 32  # also the parts that one program of the merge holds
MASKED = tl.constexpr(-1e30)  # finite, so that the difference of two is a number


@torch.library.custom_op("medusa_ray::tree_attention", mutates_args=())
def tree_attention(
    query_BTHE: Tensor,
    keys_LKE: Tensor,
    values_LKU: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    ancestors_T: Tensor,
    depth_T: Tensor,
    page_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """[B, T, H, U]: every node sees the context, and of the step's nodes its ancestors and itself.

    Node t stands behind the context, in slot length_B + t of its sequence, where its keys and values already are;
    its position is length_B + depth_T[t]. Bit a of ancestors_T[t] says that t sees node a. A window counts positions,
    not slots. What lies past the page table is not read, so a row of null pages may claim any length.
    """
    B, T, H, E = query_BTHE.shape
    _, K, U = values_LKU.shape
    P = table_BP.shape[1]
    assert T <= MASK_BITS, T
    block_e, block_u = (max(MIN_TILE_ROWS, triton.next_power_of_2(size)) for size in (E, U))
    row_bytes = max(block_e, block_u) * query_BTHE.element_size()
    tile_rows = max(MIN_TILE_ROWS, min(MAX_TILE_ROWS, TILE_BYTES // row_bytes))
    block_m = max(MIN_TILE_ROWS, min(tile_rows, triton.next_power_of_2(H // K * T)))
    block_n = min(tile_rows, page_size)
    assert page_size % block_n == 0, page_size  # a tile lies within a page
    num_tiles = K * triton.cdiv(H // K * T, block_m)
    S = splits_for(B * num_tiles, P)

    out_BTHU = query_BTHE.new_empty(B, T, H, U)
    part_BTHSU = query_BTHE.new_empty((B, T, H, S, U) if S > 1 else 0, dtype=torch.float32)
    peak_BTHS, weight_BTHS = query_BTHE.new_empty((2, B, T, H, S), dtype=torch.float32)
    with torch.cuda.device_of(query_BTHE):
        _attend[num_tiles, S, B](
            query_BTHE.contiguous(),
            keys_LKE,
            values_LKU,
            table_BP.contiguous(),
            length_B,
            ancestors_T,
            depth_T,
            sink_H,
            out_BTHU,
            part_BTHSU,
            peak_BTHS,
            weight_BTHS,
            T,
            P,
            scale,
            KV_HEADS=K,
            GROUPS=H // K,
            KEY_SIZE=E,
            VALUE_SIZE=U,
            PAGE_SIZE=page_size,
            WINDOW=window or 0,
            SOFTCAP=softcap or 0.0,
            IS_SPLIT=S > 1,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_E=block_e,
            BLOCK_U=block_u,
            num_stages=3,  # the page of the next tile but one, the next tile, this one
        )
        if S > 1:
            block_s = triton.next_power_of_2(S)
            block_r = MAX_SPLITS // block_s
            _merge[triton.cdiv(B * T * H, block_r),](
                out_BTHU,
                part_BTHSU,
                peak_BTHS,
                weight_BTHS,
                B * T * H,
                S,
                VALUE_SIZE=U,
                BLOCK_R=block_r,
                BLOCK_S=block_s,
                BLOCK_U=block_u,
            )
    return out_BTHU


@tree_attention.register_fake
def _(query_BTHE: Tensor, keys_LKE: Tensor, values_LKU: Tensor, *_: object, **__: object) -> Tensor:
    return query_BTHE.new_empty(*query_BTHE.shape[:3], values_LKU.shape[2])


def splits_for(num_programs: int, num_pages: int) -> int:
    """Enough to fill the GPU, but none for less than a few pages. From shapes alone: to know lengths is to wait."""
    wanted = triton.cdiv(WANTED_PROGRAMS, num_programs)
    return max(1, min(wanted, num_pages // MIN_SPLIT_PAGES, MAX_SPLITS))


@triton.jit
def _attend(
    query_BTHE,
    keys_LKE,
    values_LKU,
    table_BP,
    length_B,
    ancestors_T,
    depth_T,
    sink_H,
    out_BTHU,
    part_BTHSU,
    peak_BTHS,
    weight_BTHS,
    num_nodes,
    num_pages,
    scale,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One split of one sequence for one tile of its queries; an online softmax."""
    num_tiles = tl.cdiv(num_nodes * GROUPS, BLOCK_M)
    # Tiles of one head are neighbours, so that all but the first find its keys in the L2 cache.
    kv_head = tl.program_id(0) // num_tiles
    split = tl.program_id(1)
    row = tl.program_id(2)

    m = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query_M = m < num_nodes * GROUPS
    node_M = m // GROUPS
    head_M = kv_head * GROUPS + m % GROUPS
    at_M = (row * num_nodes + node_M) * (KV_HEADS * GROUPS) + head_M
    e, u = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_U)
    is_query_ME = is_query_M[:, None] & (e < KEY_SIZE)[None, :]
    query_ME = tl.load(query_BTHE + at_M[:, None] * KEY_SIZE + e[None, :], mask=is_query_ME, other=0.0)
    ancestors_M = tl.load(ancestors_T + node_M, mask=is_query_M, other=0)

    length = tl.load(length_B + row).to(tl.int32)
    end = tl.minimum(length + num_nodes, num_pages * PAGE_SIZE)
    first = 0
    if WINDOW:
        first = tl.maximum(length - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        position_M = length + tl.load(depth_T + node_M, mask=is_query_M, other=0)
    split_size = tl.cdiv(tl.cdiv(end - first, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin = first + split * split_size
    end = tl.minimum(begin + split_size, end)

    peak_M = tl.full([BLOCK_M], MASKED, tl.float32)
    weight_M = tl.zeros([BLOCK_M], tl.float32)
    sum_MU = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
    if sink_H is not None and split == 0:  # a sink is a slot seen by all, whose value is nothing
        peak_M = tl.load(sink_H + head_M, mask=is_query_M, other=0.0).to(tl.float32)
        weight_M += 1.0
    for start in range(begin, end, BLOCK_N):
        page = tl.load(table_BP + row * num_pages + start // PAGE_SIZE)
        n = tl.arange(0, BLOCK_N)
        at_N = (page.to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE + n) * KV_HEADS + kv_head
        is_slot_N = start + n < end

        behind_N = start + n - length  # negative in the context, else the node that stands there
        node_N = tl.minimum(tl.maximum(behind_N, 0), num_nodes - 1)
        is_ancestor_MN = (ancestors_M[:, None] >> node_N[None, :].to(tl.int64)) & 1 == 1
        visible_MN = is_slot_N[None, :] & ((behind_N < 0)[None, :] | is_ancestor_MN)
        if WINDOW:
            position_N = tl.where(behind_N < 0, start + n, length + tl.load(depth_T + node_N))
            visible_MN &= position_M[:, None] - position_N[None, :] < WINDOW

        is_key_NE = is_slot_N[:, None] & (e < KEY_SIZE)[None, :]
        keys_NE = tl.load(keys_LKE + at_N[:, None] * KEY_SIZE + e[None, :], mask=is_key_NE, other=0.0)
        # float32 stays float32: tf32 would break the equality with the dense path.
        scores_MN = tl.dot(query_ME, tl.trans(keys_NE), input_precision="ieee") * scale
        if SOFTCAP > 0:
            shrunk_MN = tl.exp(-2.0 / SOFTCAP * tl.abs(scores_MN))  # tanh from this side cannot overflow
            capped_MN = SOFTCAP * (1.0 - shrunk_MN) / (1.0 + shrunk_MN)
            scores_MN = tl.where(scores_MN < 0, -capped_MN, capped_MN)
        scores_MN = tl.where(visible_MN, scores_MN, MASKED)

        new_peak_M = tl.maximum(peak_M, tl.max(scores_MN, 1))
        # A query that has seen nothing yet gathers rubbish here; kept_M is nothing once it sees, and it sees itself.
        share_MN = tl.exp(scores_MN - new_peak_M[:, None])
        kept_M = tl.exp(peak_M - new_peak_M)
        weight_M = weight_M * kept_M + tl.sum(share_MN, 1)
        is_value_NU = is_slot_N[:, None] & (u < VALUE_SIZE)[None, :]
        values_NU = tl.load(values_LKU + at_N[:, None] * VALUE_SIZE + u[None, :], mask=is_value_NU, other=0.0)
        added_MU = tl.dot(share_MN.to(values_NU.dtype), values_NU, input_precision="ieee")
        sum_MU = sum_MU * kept_M[:, None] + added_MU
        peak_M = new_peak_M

    is_out_MU = is_query_M[:, None] & (u < VALUE_SIZE)[None, :]
    if IS_SPLIT:
        at_M = at_M * tl.num_programs(1) + split
        tl.store(part_BTHSU + at_M[:, None] * VALUE_SIZE + u[None, :], sum_MU, mask=is_out_MU)
        tl.store(peak_BTHS + at_M, peak_M, mask=is_query_M)
        tl.store(weight_BTHS + at_M, weight_M, mask=is_query_M)
    else:
        out_MU = sum_MU / tl.where(weight_M > 0, weight_M, 1.0)[:, None]
        tl.store(out_BTHU + at_M[:, None] * VALUE_SIZE + u[None, :], out_MU, mask=is_out_MU)


@triton.jit
def _merge(
    out_BTHU,
    part_BTHSU,
    peak_BTHS,
    weight_BTHS,
    num_queries,
    num_splits,
    VALUE_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """All splits of a few queries."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tl.arange(0, BLOCK_S)
    u = tl.arange(0, BLOCK_U)
    at_RS = r[:, None] * num_splits + s[None, :]
    is_part_RS = (r < num_queries)[:, None] & (s < num_splits)[None, :]
    is_size_U = u < VALUE_SIZE
    peak_RS = tl.load(peak_BTHS + at_RS, mask=is_part_RS, other=MASKED)
    weight_RS = tl.load(weight_BTHS + at_RS, mask=is_part_RS, other=0.0)
    part_RSU = tl.load(
        part_BTHSU + at_RS[:, :, None] * VALUE_SIZE + u[None, None, :],
        mask=is_part_RS[:, :, None] & is_size_U[None, None, :],
        other=0.0,
    )
    share_RS = tl.exp(peak_RS - tl.max(peak_RS, 1)[:, None])
    weight_R = tl.sum(weight_RS * share_RS, 1)
    sum_RU = tl.sum(part_RSU * share_RS[:, :, None], 1)
    out_RU = sum_RU / tl.where(weight_R > 0, weight_R, 1.0)[:, None]
    is_out_RU = (r < num_queries)[:, None] & is_size_U[None, :]
    tl.store(out_BTHU + r[:, None] * VALUE_SIZE + u[None, :], out_RU, mask=is_out_RU)
