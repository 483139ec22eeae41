"""Settings of requests and scores of tokens -> the base's token at each node, greedy or sampled.

Sampling adds Gumbel noise and takes the largest score, which draws from the softmax exactly. The noise is a function
of (seed, position, token) alone: not of the batch, the tree or the number of draws so far. So a seeded reply is the
same with and without heads, and alone or in any batch.

# B requests   N tree nodes   V vocab
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

MAX_LOGPROBS = 20  # OpenAI's own limit
MIN_TEMPERATURE = 1e-5  # below it, scores leave the range of a float32
# What each setting may be, ends included. Scores of any base stay finite within these; the penalties' and the
# bias's are OpenAI's.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**63 - 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, MAX_LOGPROBS),
    "typical_threshold": (0, 1),
    "typical_alpha": (0, 1),
}
WHOLE = {"top_k", "seed", "logprobs"}
MAX_BIAS = 100


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class AllowedTokens(Protocol):
    """What may follow a beginning of a reply: what a grammar is to the engine."""

    def __call__(self, token_ids: list[int]) -> Tensor:
        """bool [V]: the tokens that may come after these, the reply's so far; where none may, the reply ends.

        Asked for beginnings that may never come to be, in any order, but for none that it does not allow itself. It
        must not raise: that would end the engine.
        """


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a request wants its tokens chosen. The defaults are plain greedy decoding."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps everything
    min_p: float = 0.0
    seed: int | None = None  # None draws one
    repetition_penalty: float = 1.0  # transformers': of all tokens in prompt and reply; 1 is none
    presence_penalty: float = 0.0  # OpenAI's: of all tokens in the reply
    frequency_penalty: float = 0.0  # likewise, by how often they came
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: AllowedTokens | None = None
    logprobs: int | None = None  # log-probabilities of each token and of so many alternatives
    acceptance: Literal["exact", "typical"] = "exact"  # typical changes what is generated: see acceptance.py
    typical_threshold: float = 0.09  # epsilon and alpha of the Medusa paper, as its authors' code has them
    typical_alpha: float = 0.3
    speculates: bool = (
        True  # False: no guesses are verified for it, which changes its steps and not its tokens
    )

    @property
    def is_penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for a setting out of its range, which may be the vocabulary's."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            is_number = is_whole(value) or (isinstance(value, numbers.Real) and name not in WHOLE)
            if not is_number or not least <= value <= most:  # NaN is outside too
                kind = ", a whole number" if name in WHOLE else ""
                raise ValueError(f"{name} is {value!r}; expected {least} to {most}{kind}.")
        if not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected more than 0 and at most 1.")
        if self.acceptance not in ("exact", "typical"):
            raise ValueError(f'acceptance is {self.acceptance!r}; expected "exact" or "typical".')
        for token, bias in self.logit_bias.items():
            if not is_whole(token) or not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias has the token id {token!r}, outside 0 ... {vocab_size - 1}.")
            if not isinstance(bias, numbers.Real) or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ValueError(
                    f"logit_bias of token {token} is {bias!r}; expected {-MAX_BIAS} to {MAX_BIAS}."
                )
        if self.allowed_tokens is not None:
            mask_V = self.allowed_tokens([])
            if mask_V.dtype != torch.bool or mask_V.shape != (vocab_size,):
                raise ValueError(
                    f"allowed_tokens gave a mask of {mask_V.dtype} and shape {list(mask_V.shape)}; expected "
                    f"torch.bool and [{vocab_size}], a bool for each token."
                )


@dataclass(frozen=True)
class Penalties:
    repetition_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor


@dataclass(frozen=True)
class Typical:
    """Rows that want typical acceptance, with its epsilon and alpha; greedy rows never do."""

    is_asked_B: Tensor
    threshold_B: Tensor
    alpha_B: Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of the requests of a batch; build it once per batch, not once per step.

    What no request uses is None, and costs a step nothing. Greedy rows have the settings that change nothing.
    """

    is_sampled_B: Tensor
    temperature_B: Tensor
    seed_B: Tensor
    is_greedy: bool  # every request is
    min_p_B: Tensor | None
    top_p_B: Tensor | None
    top_k_B: Tensor | None
    bias_BV: Tensor | None
    penalties: Penalties | None
    typical: Typical | None
    is_masked: bool  # some request has allowed_tokens
    num_logprobs: int | None  # alternatives of the request that wants most
    speculates_B: Tensor | None  # rows that want guesses

    @property
    def is_plain(self) -> bool:
        """Whether every request wants the likeliest token as it is, and takes guesses."""
        changes = self.bias_BV, self.penalties, self.num_logprobs, self.speculates_B
        return self.is_greedy and not self.is_masked and all(change is None for change in changes)

    @classmethod
    def of(
        cls, requests: Sequence[Settings], seeds: Sequence[int], vocab_size: int, device: torch.device
    ) -> "Sampling":
        """seeds: the requests' own, or drawn where they have none. The requests have passed `check`."""

        def filters(name: str, neutral: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            values = [getattr(r, name) if r.temperature else neutral for r in requests]
            return (
                None
                if all(v == neutral for v in values)
                else torch.tensor(values, dtype=dtype, device=device)
            )

        temperatures = [max(r.temperature, MIN_TEMPERATURE) if r.temperature else 1.0 for r in requests]
        return cls(
            is_sampled_B=torch.tensor([r.temperature > 0 for r in requests], device=device),
            temperature_B=torch.tensor(temperatures, dtype=torch.float32, device=device),
            seed_B=torch.tensor(list(seeds), device=device),
            is_greedy=not any(r.temperature for r in requests),
            min_p_B=filters("min_p", 0),
            top_p_B=filters("top_p", 1),
            top_k_B=filters("top_k", 0, torch.long),
            bias_BV=_bias(requests, vocab_size, device),
            penalties=_penalties(requests, device),
            typical=_typical(requests, device),
            is_masked=any(r.allowed_tokens is not None for r in requests),
            num_logprobs=max((r.logprobs for r in requests if r.logprobs is not None), default=None),
            speculates_B=(
                None
                if all(r.speculates for r in requests)
                else torch.tensor([r.speculates for r in requests], device=device)
            ),
        )


def _bias(requests: Sequence[Settings], vocab_size: int, device: torch.device) -> Tensor | None:
    if not any(r.logit_bias for r in requests):
        return None
    bias_BV = torch.zeros(len(requests), vocab_size)
    for row, request in enumerate(requests):
        for token, bias in request.logit_bias.items():
            bias_BV[row, token] = bias
    return bias_BV.to(device)


def _penalties(requests: Sequence[Settings], device: torch.device) -> Penalties | None:
    if not any(r.is_penalised for r in requests):
        return None
    values = [(r.repetition_penalty, r.presence_penalty, r.frequency_penalty) for r in requests]
    return Penalties(*torch.tensor(values, dtype=torch.float32, device=device).T.unbind())


def _typical(requests: Sequence[Settings], device: torch.device) -> Typical | None:
    is_asked = [r.acceptance == "typical" and r.temperature > 0 for r in requests]
    if not any(is_asked):
        return None
    values = [(r.typical_threshold, r.typical_alpha) for r in requests]
    threshold_alpha_B = torch.tensor(values, dtype=torch.float32, device=device).T
    return Typical(torch.tensor(is_asked, device=device), *threshold_alpha_B.unbind())


def choose(scores_BNV: Tensor, position_BN: Tensor, sampling: Sampling) -> Tensor:
    """The base's token after each node, [B, N], or -1 where every score is -inf: no token may follow.

    position_BN is the position that the token will take. Scores are processors.process's.
    """
    if not sampling.is_greedy:
        noise_BNV = gumbel(sampling.seed_B, position_BN, scores_BNV.shape[-1])
        scores_BNV = scores_BNV + noise_BNV * sampling.is_sampled_B[:, None, None]
    token_BN = scores_BNV.argmax(-1)
    if sampling.is_masked:
        best_BN = scores_BNV.gather(-1, token_BN[..., None])[..., 0]
        token_BN = token_BN.masked_fill(best_BN == -torch.inf, -1)
    return token_BN


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
