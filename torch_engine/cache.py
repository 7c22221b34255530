"""Keys and values of the rows of one tenant in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from common.families import MixtralConfig


class KeyValueCache:
    """For each layer k, v [rows, kv_heads, capacity, head_dim]; row i holds `lengths[i]` tokens from position 0 on.

    Rows are aligned at their first token, so a shorter row has unused room at its end and no padding before it.
    """

    STEP = 64  # positions that capacity is rounded up to

    def __init__(self, config: MixtralConfig, num_rows: int, length: int, dtype: torch.dtype, device: torch.device):
        capacity = self._round(length, config.max_positions)
        shape = (num_rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.experts.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.experts.num_layers)]
        self._max = config.max_positions

    @classmethod
    def _round(cls, length: int, limit: int) -> int:
        return min(limit, -(-length // cls.STEP) * cls.STEP)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return 2 * len(self.keys) * self.keys[0].numel() * self.keys[0].element_size()

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a row; grows by doubling so that copies stay rare."""
        if length <= self.capacity:
            return
        extra = self._round(max(length, 2 * self.capacity), self._max) - self.capacity
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = torch.cat((old, old.new_zeros(*old.shape[:2], extra, old.shape[3])), dim=2)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 [kept]."""
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.index_select(0, rows)
