"""Token sequences -> the frozen base's hidden states where they are wanted, and what it takes for likely next.

Several sequences share a row of a pass, each with positions of its own, from which transformers makes a mask that
keeps them apart. So a pass is as long as its longest sequence and has next to no padding. States are what the output
layer receives, and logits come from the model's own forward, so that its scaling and soft caps hold.

# S sequences   B rows of a pass   T tokens   N states   K tokens kept   C hidden   V vocabulary
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

Tokens = Sequence[int]

LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in float32
# A model that takes no notice of where a sequence begins is as wrong as if all were one text; one that does differs by
# rounding alone. Half-way between them in decades, for 16 bits.
MOST_OF_RUNNING_ON = 0.1


def packs(
    lengths: Sequence[int], pass_tokens: int, row_tokens: int = 0, shares_rows: bool = True
) -> Iterator[list[list[int]]]:
    """Sequences by number, dealt into passes of rows: no pass of more tokens unless a single sequence has more.

    Rows are as long as the longest sequence left, or row_tokens if that holds several, and filled with the longest that
    still fit: what attention costs grows with the length of a row, and what padding costs falls.
    shares_rows: otherwise each row is one sequence, beside others of about its length.
    """
    left = sorted(range(len(lengths)), key=lengths.__getitem__)
    while left:
        width, wide = lengths[left[-1]], min(row_tokens, pass_tokens)
        if shares_rows and wide >= 4 * width:  # with fewer in a row, what is left over at its end outweighs the rest
            width = wide
        rows: list[list[int]] = []
        while left and len(rows) < max(1, pass_tokens // width):
            rows.append([])
            room = width
            while num_fitting := bisect_right(left, room, key=lengths.__getitem__):
                rows[-1].append(left.pop(num_fitting - 1))
                room = room - lengths[rows[-1][-1]] if shares_rows else -1
        yield rows


def hosts(sequences: Sequence[Tokens]) -> list[int]:
    """For each sequence the number of the longest one that begins with it, itself where it is alone.

    The turns of a chat are such beginnings of each other, so that a pass of the last gives the states of all.
    """
    keys = [tuple(sequence) for sequence in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    host = list(range(len(keys)))
    # Whatever stands between a beginning and what it begins, in this order, begins with it too.
    for before, after in zip(order[-2::-1], order[:0:-1], strict=True):
        if keys[host[after]][: len(keys[before])] == keys[before]:
            host[before] = host[after]
    return host


class PackedBase:
    """The frozen base, as a function of sequences and the positions whose states are wanted."""

    def __init__(self, model: PreTrainedModel, pass_tokens: int = 8192) -> None:
        """pass_tokens: of one forward pass, padding included."""
        self.model = model.eval().requires_grad_(False)
        self.pass_tokens = pass_tokens
        self.is_packable = self._is_packable()

    @property
    def hidden_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[1])

    def states(self, sequences: Sequence[Tokens], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states at each sequence's positions, on the CPU: a tensor [N, C] for each."""
        host = hosts(sequences)
        run = sorted(set(host))
        place = {number: i for i, number in enumerate(run)}
        wanted: list[list[int]] = [[] for _ in run]
        slices = []
        for number, own in enumerate(positions):
            among = wanted[place[host[number]]]
            slices.append(slice(len(among), len(among) + len(own)))
            among += own
        found: list[Tensor] = [torch.empty(0)] * len(run)
        # Attention takes a part of W / 6C of what the matrices take of a token, W being the length of its row.
        row_tokens = self.hidden_size // 2
        for rows in packs([len(sequences[i]) for i in run], self.pass_tokens, row_tokens, self.is_packable):
            tokens = [[sequences[run[i]] for i in row] for row in rows]
            numbers = [i for row in rows for i in row]
            states_NC = self._run(tokens, [[wanted[i] for i in row] for row in rows], self.is_packable).cpu()
            found_by_sequence = states_NC.split([len(wanted[i]) for i in numbers])
            for i, own_NC in zip(numbers, found_by_sequence, strict=True):
                found[i] = own_NC
        return [found[place[host[number]]][own] for number, own in enumerate(slices)]

    def teacher(self, hidden_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `teacher` below."""
        return teacher(self.model, hidden_NC, k)

    @torch.no_grad()
    def _run(self, rows: list[list[Tokens]], wanted: list[list[list[int]]], has_positions: bool) -> Tensor:
        return states_of_pass(self.model, rows, wanted, has_positions)

    def _is_packable(self) -> bool:
        """Whether two sequences in a row have the states that they have alone, measured: no list of names decides."""
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        tokens = torch.arange(1, 13).remainder(vocab_size).tolist()
        first, second = tokens[:5], tokens[5:]
        every = list(range(len(second)))
        alone_NC = self._run([[second]], [[every]], False)
        running_on_NC = self._run([[tokens]], [[[len(first) + position for position in every]]], False)
        try:
            packed_NC = self._run([[first, second]], [[[], every]], True)
        except (TypeError, ValueError):  # it takes no positions
            return False
        off, most = ((some_NC - alone_NC).float().norm() for some_NC in (packed_NC, running_on_NC))
        return bool(off <= MOST_OF_RUNNING_ON * most)


def states_of_pass(
    model: PreTrainedModel, rows: list[list[Tokens]], wanted: list[list[list[int]]], has_positions: bool
) -> Tensor:
    """States [N, C] of one pass, where they are wanted of each sequence of each row, in that order.

    has_positions: whether the model is told where each sequence begins, without which a row must be a single one.
    """
    width = max(sum(map(len, row)) for row in rows)
    token_BT = torch.zeros(len(rows), width, dtype=torch.long)
    position_BT = torch.arange(width).repeat(len(rows), 1)
    place_N: list[int] = []
    for number, (row, positions) in enumerate(zip(rows, wanted, strict=True)):
        start = 0
        for sequence, own in zip(row, positions, strict=True):
            end = start + len(sequence)
            token_BT[number, start:end] = torch.tensor(sequence)
            position_BT[number, start:end] -= start
            place_N += [number * width + start + position for position in own]
            start = end
        # What fills the row up is behind all that is looked at; it counts from 0, since some models know no more.
        position_BT[number, start:] -= start
    # A model that cannot keep sequences apart may not take positions either.
    arguments = {"position_ids": position_BT.to(model.device)} if has_positions else {}
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        taken.append(args[0].flatten(0, 1)[torch.tensor(place_N, dtype=torch.long, device=args[0].device)])
        return (args[0][:1, :1],)  # logits are not asked for

    with _before_output(model, take):
        model(input_ids=token_BT.to(model.device), use_cache=False, **arguments)
    return taken[0]


@torch.no_grad()
def teacher(model: PreTrainedModel, hidden_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The base's k likeliest tokens after each state, best first: ids [N, K], int32, and log-probabilities, float32.

    model: of a PackedBase or of an engine. Both tensors are on the CPU. Raises ValueError when the base has fewer
    tokens.
    """
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if k > vocab_size:
        raise ValueError(f"the base has {vocab_size} tokens; keep that many at most.")
    ids, logprobs = [torch.empty(0, k, dtype=torch.int32)], [torch.empty(0, k)]
    for some_NC in hidden_NC.split(max(1, LOGITS_AT_ONCE // vocab_size)):
        best = logits_of(model, some_NC).float().log_softmax(-1).topk(k)
        ids.append(best.indices.int().cpu())
        logprobs.append(best.values.cpu())
    return torch.cat(ids), torch.cat(logprobs)


def logits_of(model: PreTrainedModel, hidden_NC: Tensor) -> Tensor:
    """Logits [N, V] of states, by the model's own forward of one token, whose state they replace at the output layer.

    What the body costs for one token is little beside the logits of many states.
    """
    own = model.config._attn_implementation
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    states_1NC = hidden_NC[None].to(model.device, model.dtype)
    if own not in ("eager", "sdpa"):  # an engine's, which would want its cache
        model.set_attn_implementation("eager")
    try:
        with _before_output(model, lambda *_: (states_1NC,)):
            return model(input_ids=token_11, use_cache=False).logits[0]
    finally:
        if own not in ("eager", "sdpa"):
            model.set_attn_implementation(own)


def has_plain_logits(model: PreTrainedModel) -> bool:
    """Whether logits are the product of states and the output layer's weight, and nothing else.

    Measured without any weight, so that a model on the meta device will do: what scales, caps or shifts logits is in
    the model's own forward, behind that layer, and this is given made-up ones.
    """
    output = model.get_output_embeddings()
    size_V = torch.logspace(-2, 3, 6, device="cpu" if model.device.type == "meta" else model.device)
    made_up_11V = torch.cat([size_V, -size_V])[None, None]
    state_11C = torch.empty(1, 1, output.weight.shape[1], device=model.device, dtype=model.dtype)
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with (
        patch.object(model.base_model, "forward", lambda *_, **__: _BodyOutput(last_hidden_state=state_11C)),
        patch.object(output, "forward", lambda _: made_up_11V),
    ):
        logits_11V = model(input_ids=token_11, use_cache=False).logits
    return getattr(output, "bias", None) is None and torch.equal(logits_11V, made_up_11V)


class _BodyOutput(BaseModelOutputWithPast):
    """Has whatever a model asks of its body, as None."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _before_output(model: PreTrainedModel, hook: Any) -> Iterator[None]:
    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
