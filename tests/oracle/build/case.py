"""Checkpoints with their models and examples, and the store of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Store
from common.build.examples import CalibrationSet

NAMES = ("base", "ana", "bob")
SIZES = {
    "num_local_experts": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
MANY = 10**6  # samples: all inputs are kept


@dataclass
class Case:
    root: Path
    paths: dict[str, Path]
    models: list[Any]
    sets: dict[str, CalibrationSet]

    @property
    def store(self) -> Store:
        return Store.open(self.root / "store")
