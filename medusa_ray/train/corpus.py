"""hidden/, or distilled/ where states are streamed -> what there is to train on, all states left unread.

# H heads   V vocabulary   M draft vocabulary
"""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from medusa_ray import parts, records
from medusa_ray.config import HeadsConfig, RunConfig, TrainConfig, UserError
from medusa_ray.medusa.loss import IGNORED
from medusa_ray.states import leaves_labels
from medusa_ray.train.feed import Wanted
from medusa_ray.train.order import Ints
from medusa_ray.train.rows import SKELETON, Form, places_of

LOG = logging.getLogger("medusa_ray")
MOST_HELD_OUT = 512  # rows: enough to tell 0.05 tokens per step


@dataclass(frozen=True)
class Corpus:
    """Rows by the parts that they are in."""

    folder: str
    is_streamed: bool
    loss_on: str
    form: Form
    names: list[str]  # of the parts
    counts: list[Ints]  # of each part, the positions of each of its rows that are trained on
    held_out: list[Wanted]  # rows that are not, whole chats

    @classmethod
    def survey(cls, folder: str, config: RunConfig, hidden_size: int) -> "Corpus":
        """folder: of hidden/, or of distilled/ with hidden.mode `stream`.

        Raises UserError when there are too few positions, or when the parts are not states of this base.
        """
        form = Form(
            config.heads.num_heads,
            hidden_size,
            config.model.dtype,
            config.hidden.top_k if config.train.labels == "soft" else 0,
        )
        names = parts.names(folder)
        corpus = cls(folder, config.hidden.mode == "stream", config.data.loss_on, form, names, [], [])
        share = share_held_out(folder, config.train)
        for name, table in corpus.skeletons():
            if not corpus.is_streamed:
                corpus.check(name, table, config)
            places = places_of(table, form.num_heads)
            count_R = np.bincount(places.row_N.numpy(), minlength=len(table))
            is_held_R = np.array(
                [is_held_out(row_id, share) for row_id in table["id"].to_pylist()], dtype=bool
            )
            if len(held_R := np.flatnonzero(is_held_R & (count_R > 0))):
                corpus.held_out.append((name, held_R))
            corpus.counts.append(np.where(is_held_R, 0, count_R))
        if corpus.num_positions < config.train.most_workers:
            raise UserError(
                f"{folder} has {corpus.num_positions} positions with a label for some head, and "
                f"train.num_workers={config.train.num_workers} want one each at least. Give more chats, or allow "
                "longer replies with distill.max_new_tokens."
            )
        return corpus

    @property
    def num_positions(self) -> int:
        return int(sum(count_R.sum() for count_R in self.counts))

    def skeletons(self) -> Iterator[tuple[str, pa.Table]]:
        """Each part without its states."""
        for name in self.names:
            if not self.is_streamed:
                yield name, parts.read(self.folder, name, SKELETON)
                continue
            rows = parts.read(self.folder, name).to_pylist()
            skeletons = [
                records.hidden_row(row["id"], row["prompt_ids"], row["reply_ids"], b"", self.loss_on)
                for row in rows
                if leaves_labels(row, self.loss_on)
            ]
            yield (
                name,
                records.hidden_table(skeletons, self.form.dtype, self.form.hidden_size).select(SKELETON),
            )

    def check(self, name: str, table: pa.Table, config: RunConfig) -> None:
        """Raises UserError when a part of hidden/ is not of this base, or lacks what soft labels need."""
        found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if found.get("hidden_size") != str(self.form.hidden_size) or found.get("dtype") != self.form.dtype:
            raise UserError(
                f"{self.folder}/{name}.parquet has hidden_size={found.get('hidden_size')} and "
                f"dtype={found.get('dtype')}, but {config.model.base} has a hidden size of {self.form.hidden_size} and "
                f"model.dtype is {self.form.dtype}. Run the hidden stage with this base."
            )
        if self.form.top_k and found.get("top_k") != str(self.form.top_k):
            raise UserError(
                f"{self.folder}/{name}.parquet has top_k={found.get('top_k')}, but hidden.top_k is {self.form.top_k}, "
                "which soft labels need. Run the hidden stage with it."
            )

    def draft(self, heads: HeadsConfig, vocab_size: int) -> tuple[Tensor | None, float]:
        """The heads.draft_vocab_size tokens that labels name most often, as a token map, and their share of all labels.

        Of tokens that are named equally often, those with the lowest ids. Raises UserError when the base has fewer
        tokens.
        """
        size = heads.draft_vocab_size
        if size is None:
            return None, 1.0
        if size > vocab_size:
            raise UserError(
                f"heads.draft_vocab_size is {size}, but the base has a vocabulary of {vocab_size}. Set it to less, or "
                "to null for the whole vocabulary."
            )
        count_V = torch.zeros(vocab_size, dtype=torch.int64)
        for _, table in self.skeletons():
            labels_NH = places_of(table, heads.num_heads).labels_NH
            count_V += torch.bincount(labels_NH[labels_NH != IGNORED], minlength=vocab_size)
        chosen_M = count_V.argsort(descending=True, stable=True)[:size]
        coverage = (count_V[chosen_M].sum() / count_V.sum()).item()
        LOG.info("stage=train draft_vocab_size=%d draft_coverage=%.4f", size, coverage)
        return chosen_M.sort().values, coverage


def share_held_out(folder: str, train: TrainConfig) -> float:
    """Of the rows in a folder of parts: what the config says, unless these would be more than are needed."""
    num_rows = sum(parts.num_rows(folder, name) for name in parts.names(folder))
    return min(train.held_out, MOST_HELD_OUT / max(1, num_rows))


def is_held_out(row_id: str, share: float) -> bool:
    """Whether a row is left out of training: by its chat, so that no turn of it is trained on."""
    return zlib.crc32(row_id.split("/")[0].encode()) < share * 2**32
