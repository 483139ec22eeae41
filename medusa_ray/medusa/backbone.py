"""An unmodified transformers model -> logits and hidden states at every node of a tree.

The hidden states are what the output layer receives, and the logits come from the model's own forward, so that its
scaling and soft caps hold.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_ray.medusa import attention, conformance
from medusa_ray.medusa.attention import Step
from medusa_ray.medusa.base import Quantization, load, output_weight


class Backbone:
    """The frozen base. It takes the model over: its attention function stays ours."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ValueError for a model that cannot be served, and gives that one its own attention back."""
        conformance.refuse_declared(model)
        config: Any = model.config.get_text_config()
        self.model = model.eval().requires_grad_(False)
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.rope_limit = conformance.rope_limit(model)
        self.max_positions: int = min(
            config.max_position_embeddings, self.rope_limit or config.max_position_embeddings
        )
        self.eos_ids = _eos_ids(model)
        self._whole_output: Callable[[], Tensor] | None = None  # where the model has a shard of it
        self._wanted_BW: Tensor | None = None
        self._hidden_BWC: Tensor | None = None
        its_own = model.config._attn_implementation
        hook = model.get_output_embeddings().register_forward_pre_hook(self._before_output)
        try:
            self.kv_shapes = conformance.kv_shapes(model)
            model.set_attn_implementation(attention.NAME)
            try:
                conformance.compare(self)
            except ValueError as error:
                if not attention.takes_kernel(self.device, 1):
                    raise
                attention.distrust_kernel(error)
                conformance.compare(self)
        except Exception:
            hook.remove()
            model.set_attn_implementation(its_own)
            raise

    @classmethod
    def load(
        cls,
        base: str,
        dtype: torch.dtype,
        device: str,
        revision: str | None = None,
        quantization: Quantization = "none",
        num_shards: int = 1,
    ) -> "Backbone":
        """From a folder or hub name, of an adapter too; num_shards as base.load takes it.

        Raises OSError when it is neither, ValueError when it cannot be loaded or served.
        """
        backbone = cls(load(base, dtype, device, revision, quantization, num_shards))
        if num_shards > 1:
            backbone._whole_output = partial(output_weight, base, revision)
        return backbone

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def output_weight_VC(self) -> Tensor:
        if self._whole_output is None:
            return self.model.get_output_embeddings().weight
        return self._whole_output().to(self.device, self.dtype)

    def forward(self, token_BT: Tensor, step: Step, wanted_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, W, V] and hidden states [B, W, C] at the wanted tokens of each row."""
        # Guesses may stand behind the last position, where the table of learned ones ends and RoPE may change its
        # frequencies. What they say is never used: no reply is that long.
        position_BT = step.position_BT.clamp_max(self.max_positions - 1)
        return self._call(token_BT, wanted_BW, position_ids=position_BT, step=step)

    def plain_forward(self, token_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The same of all tokens, by the model's own means, without a cache: what `forward` is measured against."""
        every_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand(len(token_BT), -1)
        self.model.set_attn_implementation("eager")
        outputs = self._call(token_BT, every_BT)
        self.model.set_attn_implementation(attention.NAME)
        return outputs

    def _call(self, token_BT: Tensor, wanted_BW: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        self._wanted_BW = wanted_BW
        try:
            output = self.model(input_ids=token_BT, use_cache=False, **arguments)
        finally:
            self._wanted_BW = None
        assert self._hidden_BWC is not None
        return output.logits, self._hidden_BWC

    def _before_output(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Lets only the wanted states into the output layer: a large vocabulary makes logits dear."""
        if self._wanted_BW is None:  # a call of the model that is not ours
            return None
        (hidden_BTC,) = args
        wanted_BWC = self._wanted_BW[..., None].expand(-1, -1, hidden_BTC.shape[2])
        self._hidden_BWC = hidden_BTC.gather(1, wanted_BWC)
        return (self._hidden_BWC,)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    generation = model.generation_config
    eos = None if generation is None else generation.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
