"""Prompts -> the replies of transformers' own `generate`: what ours must equal, and what we are measured beside.

It runs with transformers' own attention and cache, so that nothing of the engine is in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_ray.medusa import attention


def generate(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, batch_size: int, **options: Any
) -> list[list[int]]:
    """Greedy replies in left-padded batches of prompts of like lengths; options go to `generate`."""
    replies: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with own_attention(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = len(prompts[batch[-1]])
            ids = [[0] * (longest - len(prompts[i])) + prompts[i] for i in batch]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
            # Typed as what mixes GenerationMixin in, which PreTrainedModel itself does not.
            generator: Any = model
            out = generator.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **options,
            )
            for i, row in zip(batch, out[:, longest:].tolist(), strict=True):
                replies[i] = _until_eos(row, model)
    return [replies[i] for i in range(len(prompts))]


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the model attends as transformers would have it."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)


def _until_eos(tokens: list[int], model: PreTrainedModel) -> list[int]:
    """The reply without the padding that `generate` puts behind it."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    ends = {eos} if isinstance(eos, int) else set(eos or [])
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)
