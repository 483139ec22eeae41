"""The first chats of each source -> how many there are, and how long. Reads a few megabytes at most, without Ray.

Tokens are those of the texts by the base's tokenizer.json (a quarter of the characters where it is out of reach), and
TEMPLATE_TOKENS for what a chat template writes around a message.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import fsspec.compression
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray.config import RunConfig
from medusa_ray.data.chats import Refusal
from medusa_ray.data.reading import Piece, rows, whole_files
from medusa_ray.data.render import Turn, turns_of
from medusa_ray.data.sources import Source

NUM_CHATS = 300  # of each source
TEMPLATE_TOKENS = 4
COUNTED_BYTES = 2**25  # a larger file is not read to its end
HEAD_BYTES = 2**21


@dataclass(frozen=True)
class Sample:
    """One source, or several: totals are what its first chats suggest for all."""

    num_chats: float
    is_counted: bool  # the number of chats, to the last
    num_rows: float  # turns to be answered
    prompt_tokens: float
    reply_tokens: float  # of the chats' own answers
    num_answered: float  # rows with one
    text_bytes: float

    def __add__(self, other: "Sample") -> "Sample":
        is_counted = self.is_counted and other.is_counted
        mine, theirs = vars(self), vars(other)
        sums = {name: mine[name] + theirs[name] for name in mine if name != "is_counted"}
        return Sample(is_counted=is_counted, **sums)

    @property
    def mean_reply(self) -> float | None:
        return self.reply_tokens / self.num_answered if self.num_answered else None

    def scaled(self, share: float) -> "Sample":
        values = {name: value * share for name, value in vars(self).items() if name != "is_counted"}
        return replace(self, **values)


def take(source: Source, run: RunConfig, count_tokens: Callable[[list[str]], list[int]]) -> Sample | None:
    """What one source holds; None where its first file cannot be read as chats."""
    wholes = whole_files([source])
    try:
        counts = [num_chats(whole) for whole in wholes]
        chats = list(itertools.islice(_good(wholes), NUM_CHATS))
    except Refusal:
        return None
    if not chats:
        return None
    turns = [turn for text in chats for turn in turns_of(json.loads(text), run.data.loss_on)]
    prompts = [_prompt(turn) for turn in turns]
    prompt_tokens = [
        count + TEMPLATE_TOKENS * (len(turn.messages or ()) + 1)
        for turn, count in zip(turns, count_tokens(prompts), strict=True)
    ]
    replies = [turn.reference for turn in turns if turn.reference is not None]
    reply_tokens = [count + 1 for count in count_tokens(replies)]
    return Sample(
        num_chats=len(chats),
        is_counted=all(is_counted for _, is_counted in counts),
        num_rows=sum(length <= run.data.max_prompt_tokens for length in prompt_tokens),
        prompt_tokens=sum(length for length in prompt_tokens if length <= run.data.max_prompt_tokens),
        reply_tokens=sum(min(length, run.distill.max_new_tokens) for length in reply_tokens),
        num_answered=len(replies),
        text_bytes=sum(len(text) for text in (*prompts, *replies)),
    ).scaled(sum(number for number, _ in counts) / len(chats) * source.weight)


def _good(wholes: list[Piece]) -> Iterator[str]:
    for whole in wholes:
        yield from (row.text for row in rows(whole) if row is not None and row.error is None)


def _prompt(turn: Turn) -> str:
    return turn.text if turn.messages is None else "\n".join(each["content"] for each in turn.messages)


def num_chats(whole: Piece) -> tuple[float, bool]:
    """Rows of a file, and whether they were counted; by the bytes of its first ones where it is large.

    Raises Refusal for what cannot be read.
    """
    try:
        if whole.format == "parquet":
            with fsspec.open(whole.file, "rb", compression="infer") as stream:
                return pq.ParquetFile(stream).metadata.num_rows, True
        if whole.format == "json":
            return sum(row is not None for row in rows(whole)), True  # a list is read whole in any case
        with fsspec.open(whole.file, "rb") as raw:
            kind = fsspec.utils.infer_compression(whole.file)
            stream = fsspec.compression.compr[kind](raw, mode="rb") if kind else raw
            most = COUNTED_BYTES if "://" not in whole.file or whole.file.startswith("file:") else HEAD_BYTES
            text = stream.read(most if whole.size <= most and not kind else HEAD_BYTES)
            is_whole = not stream.read(1)
            share = 1.0 if is_whole or not whole.size else min(1.0, raw.tell() / whole.size)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise Refusal(f"{whole.file} cannot be read: {error}") from error
    lines = sum(bool(line.strip()) for line in text.splitlines()) - (whole.format == "csv")
    # A cell of a CSV may hold the ends of lines.
    return max(lines, 0) / share, is_whole and whole.format != "csv"


def counter(tokenizer: Path | None) -> Callable[[list[str]], list[int]]:
    """Counts the tokens of texts, by the file of a tokenizer where there is one."""
    if tokenizer is None:
        return lambda texts: [-(-len(text) // 4) for text in texts]
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))
    return lambda texts: [len(each.ids) for each in backend.encode_batch(texts, add_special_tokens=False)]
