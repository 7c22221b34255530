"""What calibration measured of one tenant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.dtypes import to_float32
from common.errors import PlanError
from common.families import ExpertSpec


@dataclass(frozen=True)
class Profile:
    """What was measured of one tenant.

    tokens: number of tokens seen in each layer, int64 [layers] (Switch: encoder's and decoder's
        differ).
    counts: int64 [layers, experts], how many of them the expert was picked for.
    gate_squares: float64 [layers, experts], sum of squared gates over these.
    inputs: float32 [rows, H], sampled inputs; gates: float32 [rows]; starts: int64 [layers *
        experts + 1], whose rows.
    sensitivity: float64 [layers], divergence (nats a token) by squared error (a token); 0: not
        measured.
    """

    tokens: np.ndarray
    counts: np.ndarray
    gate_squares: np.ndarray
    inputs: np.ndarray
    gates: np.ndarray
    starts: np.ndarray
    sensitivity: np.ndarray

    def sample(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Sampled inputs float32 [n, H] of an expert and their gates float32 [n]."""
        place = layer * self.counts.shape[1] + expert
        rows = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return to_float32(self.inputs[rows]), self.gates[rows]

    def check(self, spec: ExpertSpec, tenant: str) -> None:
        """Whether it is of experts like these. Raises PlanError."""
        found = (*self.counts.shape, self.inputs.shape[-1])
        expected = (spec.num_layers, spec.num_experts, spec.hidden_size)
        if found != expected:
            raise PlanError(
                f"calibration of {tenant!r} is of {found[0]} layers with {found[1]} experts of "
                f"width {found[2]}, the "
                f"store's have {expected[0]}, {expected[1]} and {expected[2]}; measure it on this "
                "store"
            )

    def to_json(self, put: Callable[[np.ndarray], str]) -> dict[str, Any]:
        """For a manifest; arrays go through `put`, which returns an object's id."""
        objects = {
            name: put(getattr(self, name)) for name in ("inputs", "gates") if len(self.inputs)
        }
        return {
            "objects": objects,
            "rows": len(self.inputs),
            **{name: getattr(self, name).tolist() for name in TABLES},
        }


TABLES = {
    "tokens": np.int64,
    "counts": np.int64,
    "gate_squares": np.float64,
    "starts": np.int64,
    "sensitivity": np.float64,
}
