"""Rotary position embedding in the half-split form of Hugging Face checkpoints.

Source: RoFormer (arXiv 2104.09864); transformers, models/mixtral/modeling_mixtral.py; scaled
variants from transformers.modeling_rope_utils.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.families import Decoder
from common.families.shape import Rope


def inverse_frequencies(shape: Decoder) -> tuple[Tensor, float]:
    """float32 [head_dim / 2] and the factor that cos and sin are multiplied by."""
    attention = shape.attention
    assert isinstance(attention.positions, Rope)
    rope = dict(attention.positions.parameters)
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, attention.head_dim, 2, dtype=torch.float32) / attention.head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    from transformers import MixtralConfig as HFConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf_config = HFConfig(
        hidden_size=shape.hidden,
        num_attention_heads=attention.heads,
        head_dim=attention.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters=rope,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, torch.device("cpu"))
    return frequencies.float().cpu(), float(factor)


class RotaryTable:
    """cos and sin for positions 0..length-1, grown when a longer text comes."""

    def __init__(self, shape: Decoder, dtype: torch.dtype, device: torch.device):
        self._frequencies, self._factor = inverse_frequencies(shape)
        self._dtype, self._device = dtype, device
        self._max = shape.max_positions
        self._grow(min(512, self._max))

    def _grow(self, length: int) -> None:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self._frequencies
        # In float32 first, then the type of the activations: as transformers does.
        self._cos = (angles.cos() * self._factor).to(self._dtype).to(self._device)
        self._sin = (angles.sin() * self._factor).to(self._dtype).to(self._device)

    def at(self, positions: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """cos, sin [tokens, 1, head_dim / 2] for int64 positions [tokens], of which `last` is the
        largest."""
        self.reach(last)
        return self._cos[positions, None], self._sin[positions, None]

    def reach(self, last: int) -> None:
        """Have the tables hold position `last`."""
        if last >= len(self._cos):
            self._grow(min(self._max, max(last + 1, 2 * len(self._cos))))

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos, sin [positions, head_dim / 2]; others once they have grown."""
        return self._cos, self._sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) by its angle. x: [tokens, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
