"""Heads that know, or half know, what the base will say: they make trees deep without any training."""

import random

import torch
from torch import Tensor


class OracleHeads:
    """Guesses from known replies: right with chance `skill`, at a random rank; wrong tokens otherwise.

    The state alone does not tell where a sequence stands, so the test hands over the engine's own sequences; how far
    they are, the batch knows: the host may not have read it yet.
    """

    layout = "own"

    def __init__(self, hidden_size: int, vocab_size: int, num_heads: int = 3, skill: float = 0.7) -> None:
        self.hidden_size, self.vocab_size, self.num_heads, self.skill = (
            hidden_size,
            vocab_size,
            num_heads,
            skill,
        )
        self.draft_vocab_size = vocab_size
        self.replies: dict[tuple[int, ...], list[int]] = {}
        self.engine = None
        self.random = random.Random(0)

    def stack(self) -> "OracleHeads":
        return self

    def topk(self, hidden_BC: Tensor, k: int) -> Tensor:
        rows = []
        lengths = self.engine._batch.ahead.length_B.tolist()
        for sequence, length in zip(self.engine.scheduler.running[: len(hidden_BC)], lengths, strict=True):
            prompt = sequence.request.prompt_ids
            coming = self.replies[tuple(prompt)][length + 1 - len(prompt) :]
            rows.append([self._guesses(coming[h : h + 1], k) for h in range(self.num_heads)])
        return torch.tensor(rows, device=hidden_BC.device)

    def _guesses(self, right: list[int], k: int) -> list[int]:
        guesses = self.random.sample([t for t in range(self.vocab_size) if t not in right], k)
        if right and self.random.random() < self.skill:
            guesses[self.random.randrange(k)] = right[0]
        return guesses


class TableHeads:
    """Guesses by heart: looks up the known state that lies nearest, and gives what is written beside it.

    A pure function of the state, like real heads: a wrong state finds wrong guesses.
    """

    layout = "own"

    def __init__(self, state_MC: Tensor, guess_MHK: Tensor, vocab_size: int) -> None:
        self.state_MC, self.guess_MHK = state_MC, guess_MHK
        self.hidden_size, self.num_heads = state_MC.shape[1], guess_MHK.shape[1]
        self.vocab_size = self.draft_vocab_size = vocab_size

    def stack(self) -> "TableHeads":
        return self

    def topk(self, hidden_BC: Tensor, k: int) -> Tensor:
        return self.guess_MHK[torch.cdist(hidden_BC, self.state_MC).argmin(-1), :, :k]
