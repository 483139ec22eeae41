"""An unmodified transformers model -> logits and hidden states at every node of a tree.

The hidden states are what the output layer receives, and the logits come from the model's own forward, so that its
scaling and soft caps hold.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medusa_ray.medusa import attention
from medusa_ray.medusa.attention import Step

SERVABLE_LAYERS = {"full_attention", "sliding_attention"}


class Backbone:
    """The frozen base. It takes the model over: its attention function stays ours."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        name = type(model).__name__
        layers = set(getattr(config, "layer_types", None) or []) - SERVABLE_LAYERS
        if layers:
            raise ValueError(
                f"{name} has layers of type {sorted(layers)}; a token tree can be verified on "
                f"{sorted(SERVABLE_LAYERS)} only, since other layers keep a state that cannot be taken back. "
                "Serve it without medusa_ray."
            )
        if not model._supports_attention_backend:
            raise ValueError(
                f"{name} does not use transformers' attention interface, which the engine works through."
            )
        self.model = model.eval().requires_grad_(False)
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.max_positions: int = config.max_position_embeddings
        self.eos_ids = _eos_ids(model)
        self.kv_heads, self.head_size = self._kv_shape()
        self._wanted_BW: Tensor | None = None
        self._hidden_BWC: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._before_output)

    @classmethod
    def load(cls, base: str, dtype: torch.dtype, device: str, revision: str | None = None) -> "Backbone":
        """From a folder or hub name. Raises OSError when it is neither, ValueError when it cannot be served."""
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, revision=revision)
        return cls(model.to(device))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def output_weight_VC(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def forward(self, token_BT: Tensor, step: Step, wanted_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, W, V] and hidden states [B, W, C] at the wanted tokens of each row."""
        self._wanted_BW = wanted_BW
        output = self.model(input_ids=token_BT, position_ids=step.position_BT, use_cache=False, step=step)
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

    def _kv_shape(self) -> tuple[int, int]:
        """Key/value heads and their size, seen in one dummy call: configs name them in too many ways."""
        seen: list[tuple[int, int]] = []

        def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
            seen.append((key.shape[1], key.shape[3]))
            return torch.zeros_like(query).transpose(1, 2), None

        ALL_ATTENTION_FUNCTIONS.register(f"{attention.NAME}_look", look)
        self.model.set_attn_implementation(f"{attention.NAME}_look")
        with torch.inference_mode():
            zero = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            self.model(input_ids=zero, position_ids=zero, use_cache=False)
        self.model.set_attn_implementation(attention.NAME)
        assert len(set(seen)) == 1, f"layers with different key/value shapes: {sorted(set(seen))}"
        return seen[0]


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    generation = model.generation_config
    eos = None if generation is None else generation.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
