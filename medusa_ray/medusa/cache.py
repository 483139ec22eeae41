"""Key/value memory of all running sequences, in pages.

Invariant: the cache holds exactly the committed tokens of each sequence but its root, whose keys and values are
written by the step that takes it in. What rejected guesses have written lies behind that and is overwritten.

Sequences whose prompts begin alike share the pages that this beginning fills. Those are never written again, and stay
when nobody uses them until their room is needed, the longest unused first.

# B sequences   T tokens of a step   D tokens of a walk   P pages   S slots read   K key/value heads   E head size
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAGE_SIZE = 64
NULL_PAGE = 0  # Padding writes here, and unused entries of a page table point here.


class KVShape(NamedTuple):
    """What a layer stores of one token. Latent attention has values smaller than keys, Gemma 4 two kinds of layers."""

    num_heads: int
    key_size: int
    value_size: int


class PagedCache:
    """One key and one value tensor per layer: a single pool for all layers would be copied by torch.compile."""

    def __init__(
        self,
        shapes: Sequence[KVShape],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        shares_prefixes: bool = True,
    ) -> None:
        """shapes: one for each layer."""
        num_slots = (num_pages + 1) * PAGE_SIZE

        def pools(sizes: list[tuple[int, int]]) -> list[Tensor]:
            return [torch.zeros(num_slots, *size, dtype=dtype, device=device) for size in sizes]

        self.keys = pools([(shape.num_heads, shape.key_size) for shape in shapes])
        self.values = pools([(shape.num_heads, shape.value_size) for shape in shapes])
        self.device, self.shares_prefixes = device, shares_prefixes
        self._free = list(range(num_pages, NULL_PAGE, -1))
        self._num_users = [0] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}  # by the digest of all tokens up to the page's end
        self._digest_of: dict[int, bytes] = {}
        self._idle: dict[
            int, None
        ] = {}  # pages that keep a beginning and have no user, the longest unused first

    @property
    def num_pages(self) -> int:
        """Pages there are, the null page not among them."""
        return len(self._num_users) - 1

    @property
    def num_blank_pages(self) -> int:
        """Pages that can be had, and keep nothing."""
        return len(self._free)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had, those that keep an unused beginning among them."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold."""
        return 1 - self.num_free_pages / (len(self._num_users) - 1)

    @staticmethod
    def pages_for(num_tokens: int) -> int:
        return -(-num_tokens // PAGE_SIZE)

    def take(self, num_pages: int) -> list[int]:
        """Pages for one sequence; the caller has seen that there are enough."""
        assert num_pages <= self.num_free_pages, (num_pages, self.num_free_pages)
        while len(self._free) < num_pages:
            page = next(iter(self._idle))
            del self._idle[page], self._page_of[self._digest_of.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._num_users[page] = 1
        return pages

    def give_back(self, pages: list[int]) -> None:
        # The last first: a beginning is of no use without what comes before it, so it is forgotten before that.
        for page in reversed(pages):
            self._num_users[page] -= 1
            if not self._num_users[page]:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def share(self, prompt_ids: list[int]) -> list[int]:
        """Pages that hold the beginning of a prompt already, for one more sequence. One token at least is left over."""
        pages: list[int] = []
        for digest in _digests(prompt_ids[:-1]) if self.shares_prefixes else ():
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            self._num_users[page] += 1
            self._idle.pop(page, None)
        return pages

    def keep(self, prompt_ids: list[int], pages: list[int]) -> None:
        """Lets later sequences share the pages that a prompt fills; its keys and values are in them."""
        for digest, page in zip(_digests(prompt_ids), pages, strict=False) if self.shares_prefixes else ():
            if digest not in self._page_of:
                self._page_of[digest], self._digest_of[page] = page, digest

    def page_table(self, pages_of: list[list[int]], width: int) -> Tensor:
        """[B, P] the first `width` pages of each sequence, filled up with the null page."""
        rows = [pages[:width] + [NULL_PAGE] * (width - len(pages)) for pages in pages_of]
        return torch.tensor(rows, device=self.device)


def _digests(token_ids: list[int]) -> Iterator[bytes]:
    """Of each full page of tokens: what tells it apart, the tokens before it included."""
    digest = hashlib.sha256()
    for end in range(PAGE_SIZE, len(token_ids) + 1, PAGE_SIZE):
        digest.update(array("q", token_ids[end - PAGE_SIZE : end]).tobytes())
        yield digest.digest()


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


def compact(
    keys: list[Tensor], values: list[Tensor], table_BP: Tensor, length_B: Tensor, walk_BD: Tensor
) -> None:
    """Moves the keys and values of a walk's nodes, which stand behind the context, to where its tokens come in a row.

    No node's place comes after the node; a place that would, as behind the end of a walk, is left as it is.
    """
    place_D = torch.arange(walk_BD.shape[1], device=walk_BD.device)
    to_BD = slots(table_BP, length_B[:, None] + place_D).flatten()
    from_BD = slots(table_BP, length_B[:, None] + torch.maximum(walk_BD, place_D)).flatten()
    for pool in (*keys, *values):
        pool.index_copy_(0, to_BD, pool.index_select(0, from_BD))
