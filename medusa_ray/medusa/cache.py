"""Key/value memory of all running sequences, in pages.

Invariant: the cache holds exactly the committed tokens of each sequence but its root, whose keys and values are
written by the step that takes it in. What rejected guesses have written lies behind that and is overwritten.

# B sequences   T tokens of a step   D tokens of a walk   P pages   S slots read   K key/value heads   E head size
"""

import torch
from torch import Tensor

PAGE_SIZE = 64
NULL_PAGE = 0  # Padding writes here, and unused entries of a page table point here.


class PagedCache:
    """One key and one value tensor per layer: a single pool for all layers would be copied by torch.compile."""

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = ((num_pages + 1) * PAGE_SIZE, kv_heads, head_size)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.device = device
        self._free = list(range(num_pages, NULL_PAGE, -1))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @staticmethod
    def pages_for(num_tokens: int) -> int:
        return -(-num_tokens // PAGE_SIZE)

    def take(self, num_pages: int) -> list[int]:
        """Pages for one sequence; the caller has seen that there are enough."""
        assert num_pages <= len(self._free), (num_pages, len(self._free))
        return [self._free.pop() for _ in range(num_pages)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))

    def page_table(self, pages_of: list[list[int]], width: int) -> Tensor:
        """[B, P] the first `width` pages of each sequence, filled up with the null page."""
        rows = [pages[:width] + [NULL_PAGE] * (width - len(pages)) for pages in pages_of]
        return torch.tensor(rows, device=self.device)

    def compact(self, from_BD: Tensor, to_BD: Tensor) -> None:
        """Moves a walk's keys and values to where its tokens now stand, in every layer."""
        source, target = from_BD.flatten(), to_BD.flatten()
        for pool in (*self.keys, *self.values):
            pool.index_copy_(0, target, pool.index_select(0, source))


def slots(table_BP: Tensor, position_BT: Tensor) -> Tensor:
    """Slot of each position of each sequence, [B, T]."""
    return table_BP.gather(1, position_BT // PAGE_SIZE) * PAGE_SIZE + position_BT % PAGE_SIZE


def all_slots(table_BP: Tensor) -> Tensor:
    """Slots of every position that the pages of a table hold, [B, P * PAGE_SIZE]."""
    within_page = torch.arange(PAGE_SIZE, device=table_BP.device)
    return (table_BP[:, :, None] * PAGE_SIZE + within_page).flatten(1)


def write(pool: Tensor, slot_BT: Tensor, states_BTKE: Tensor) -> None:
    """Puts the keys or values of a step into one layer's pool."""
    pool.index_copy_(0, slot_BT.flatten(), states_BTKE.flatten(0, 1))


def read(pool: Tensor, slot_BS: Tensor) -> Tensor:
    """Keys or values [B, S, K, E] of the slots of one layer's pool."""
    return pool.index_select(0, slot_BS.flatten()).unflatten(0, slot_BS.shape)
