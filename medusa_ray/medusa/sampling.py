"""Logits -> the base's token at each node, greedy or sampled.

Sampling adds Gumbel noise and takes the largest score, which draws from the softmax exactly. The noise is a function
of (seed, position, token) alone: not of the batch, the tree or the number of draws so far. So a seeded reply is the
same with and without heads, and alone or in any batch.

# B requests   N tree nodes   V vocab
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of the requests of a batch; build it once per batch, not once per step."""

    temperature_B: Tensor  # 0 is greedy
    top_p_B: Tensor  # 1 keeps everything
    top_k_B: Tensor  # 0 keeps everything
    seed_B: Tensor
    is_greedy: bool  # every request is
    is_filtered: bool  # some request has a top_p or top_k

    @classmethod
    def of(
        cls,
        temperatures: list[float],
        top_ps: list[float],
        top_ks: list[int],
        seeds: list[int],
        device: torch.device,
    ) -> "Sampling":
        return cls(
            torch.tensor(temperatures, device=device),
            torch.tensor(top_ps, device=device),
            torch.tensor(top_ks, device=device),
            torch.tensor(seeds, device=device),
            is_greedy=not any(temperatures),
            is_filtered=any(p < 1 for p in top_ps) or any(top_ks),
        )


def choose(logits_BNV: Tensor, position_BN: Tensor, sampling: Sampling) -> Tensor:
    """The base's token after each node, [B, N]; position_BN is the position that the token will take."""
    greedy_BN = logits_BNV.argmax(-1)
    if sampling.is_greedy:
        return greedy_BN
    temperature_B11 = sampling.temperature_B.clamp_min(1e-5)[:, None, None]
    scores_BNV = logits_BNV.float() / temperature_B11
    if sampling.is_filtered:
        scores_BNV = keep_likely(scores_BNV, sampling.top_p_B, sampling.top_k_B)
    sampled_BN = (scores_BNV + gumbel(sampling.seed_B, position_BN, logits_BNV.shape[-1])).argmax(-1)
    return torch.where(sampling.temperature_B[:, None] > 0, sampled_BN, greedy_BN)


def keep_likely(scores_BNV: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    """Scores with all but the likely tokens at -inf: the top_k first, then the smallest set that holds top_p of
    what is left. The most likely token always stays."""
    sorted_BNV, order_BNV = scores_BNV.sort(-1, descending=True)
    rank_V = torch.arange(scores_BNV.shape[-1], device=scores_BNV.device)
    limit_B = torch.where(top_k_B > 0, top_k_B, scores_BNV.shape[-1])
    sorted_BNV = sorted_BNV.masked_fill(rank_V >= limit_B[:, None, None], -torch.inf)
    chance_BNV = sorted_BNV.softmax(-1)
    before_BNV = chance_BNV.cumsum(-1) - chance_BNV
    # A top_p of 1 keeps everything: rounding can bring the running sum to 1 before the last token.
    outside_BNV = (before_BNV >= top_p_B[:, None, None]) & (top_p_B < 1)[:, None, None]
    sorted_BNV = sorted_BNV.masked_fill(outside_BNV, -torch.inf)
    return torch.empty_like(scores_BNV).scatter(-1, order_BNV, sorted_BNV)


def gumbel(seed_B: Tensor, position_BN: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, N, V] from a hash of (seed, position, token)."""
    token_V = torch.arange(vocab_size, device=seed_B.device)
    stream_BN = _mix(_mix(seed_B)[:, None] + position_BN)
    # 23 bits and a half still fit a float32 exactly, so that the uniform is never 0 or 1.
    bits_BNV = _mix(stream_BN[..., None] + token_V) >> 41 & 0x7FFFFF
    uniform_BNV = (bits_BNV.float() + 0.5) / 2**23
    return -(-uniform_BNV.log()).log()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors, which wrap as it needs."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
