"""What tests of the engine need to know of a family, by Hugging Face alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common import (
    Engine,
    Plan,
)
from tests import helpers, switch_models


class Kind(ABC):
    """What the suite needs to know of a family: its models, by Hugging Face alone, and how they are
    called."""

    backend: str
    context: int
    models: list[Any]
    paths: dict[str, Path]

    @abstractmethod
    def make(self, seed: int, vocab_size: int) -> Any: ...

    @abstractmethod
    def tune(self, model: Any, seed: int) -> Any: ...

    @abstractmethod
    def oracle(self, index: int, plan: Plan) -> Any: ...

    @abstractmethod
    def greedy(self, model: Any, row: list[int], count: int) -> list[int]: ...

    @abstractmethod
    def logits(self, engine: Engine, tenant: str, rows: Any) -> np.ndarray:
        """The engine's, for rows of the sequence that logits are given for; other input is
        fixed."""

    @abstractmethod
    def hf_logits(self, model: Any, row: list[int]) -> np.ndarray: ...

    @abstractmethod
    def lookups(self, prompt: int, new: int) -> int:
        """Expert look-ups of a request."""


class Mixtral(Kind):
    backend, context = "torch", 256

    def make(self, seed: int, vocab_size: int) -> Any:
        return helpers.random_mixtral(seed, vocab_size=vocab_size)

    def tune(self, model: Any, seed: int) -> Any:
        return helpers.tuned(model, seed)

    def oracle(self, index: int, plan: Plan) -> Any:
        return helpers.oracle(self.models, index, plan)

    def greedy(self, model: Any, row: list[int], count: int) -> list[int]:
        return helpers.hf_greedy(model, row, count)

    def logits(self, engine: Engine, tenant: str, rows: Any) -> np.ndarray:
        return engine.logits(tenant, rows)

    def hf_logits(self, model: Any, row: list[int]) -> np.ndarray:
        return helpers.hf_logits(model, [row])

    def lookups(self, prompt: int, new: int) -> int:
        return (prompt + new - 1) * 2 * 2


class Switch(Kind):
    backend, context = "jax", 4096
    prompt: ClassVar[list[int]] = [7, 8, 9, 10]

    def make(self, seed: int, vocab_size: int) -> Any:
        return switch_models.random_switch(seed, vocab_size=vocab_size, eos_token_id=2)

    def tune(self, model: Any, seed: int) -> Any:
        return switch_models.tuned(model, seed)

    def oracle(self, index: int, plan: Plan) -> Any:
        return switch_models.oracle(self.models, index, plan)

    def greedy(self, model: Any, row: list[int], count: int) -> list[int]:
        return switch_models.hf_greedy(model, row, count)

    def logits(self, engine: Engine, tenant: str, rows: Any) -> np.ndarray:
        return engine.logits(tenant, [self.prompt] * len(rows), rows)

    def hf_logits(self, model: Any, row: list[int]) -> np.ndarray:
        return switch_models.hf_logits(model, [self.prompt], [row])

    def lookups(self, prompt: int, new: int) -> int:
        return prompt + new
