"""A checkpoint of any format, seen as canonical tensor names that can be read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoints.safetensors_file import TensorRef
from common.families import Family, ModelConfig


@dataclass(frozen=True)
class Checkpoint:
    """Opened, checked against its config, nothing read yet.

    tensors: canonical name (see `common.families`) -> where it lies.
    assets: tokenizer, chat template, configs: files that travel with the tenant, by file name.
    """

    path: Path
    family: Family
    config: ModelConfig
    tensors: Mapping[str, TensorRef]
    assets: Mapping[str, Path]

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, array) one by one; memory for one tensor at a time."""
        for name, ref in self.tensors.items():
            yield name, ref.read()

    @property
    def expert_dtype(self) -> str:
        """The type of the expert weights (of the first, if they were mixed)."""
        first = self.family.expert_tensor(self.config, 0, 0, self.config.experts.projections[0][0])
        return self.tensors[first].dtype
