"""What an expert computes, in numpy: for measuring what another expert in its place would change.

`down (act(gate x) * (up x))`, or without a gate `down act(up x)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.families import ExpertSpec

Matrices = Mapping[str, np.ndarray]
"""projection -> float32 [out, in]"""


def inputs_and_output(spec: ExpertSpec) -> tuple[tuple[str, ...], str]:
    """The projections that read the expert's input (the first goes through the activation), and the
    last one."""
    *first, last = (name for name, _ in spec.projections)
    return tuple(first), last


def _erf(x: np.ndarray) -> np.ndarray:
    """Abramowitz and Stegun, formula 7.1.26: within 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return np.asarray(np.sign(x) * (1 - series * np.exp(-x * x)))


def activate(x: np.ndarray, kind: str) -> np.ndarray:
    """silu, gelu, gelu_new (tanh) or relu."""
    if kind == "relu":
        return np.asarray(np.maximum(x, 0))
    if kind == "silu":
        return np.asarray(x / (1 + np.exp(-np.clip(x, -80, None))))
    if kind == "gelu":
        return np.asarray(0.5 * x * (1 + _erf(x / np.sqrt(np.float32(2)))))
    if kind in ("gelu_new", "gelu_pytorch_tanh"):
        return np.asarray(0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))))
    raise ValueError(f"no activation {kind!r}")


def slope(x: np.ndarray, kind: str) -> np.ndarray:
    """The activation's derivative, by central differences."""
    step = np.float32(1e-2)
    return np.asarray((activate(x + step, kind) - activate(x - step, kind)) / (2 * step))


def inner(spec: ExpertSpec, x: np.ndarray, weights: Matrices) -> np.ndarray:
    """What the last projection reads: [T, H] -> [T, I]."""
    return inner_of(spec, {name: x @ weights[name].T for name in inputs_and_output(spec)[0]})


def inner_of(spec: ExpertSpec, before: Matrices) -> np.ndarray:
    """The same, of what the projections that read the input make of it: [T, I] of each."""
    first, *second = inputs_and_output(spec)[0]
    hidden = activate(before[first], spec.activation)
    for name in second:
        hidden = hidden * before[name]
    return np.asarray(hidden)


def plus(weights: Matrices, added: Matrices) -> dict[str, np.ndarray]:
    """Weights with what is added to some projections."""
    return {name: m + added[name] if name in added else m for name, m in weights.items()}


def forward(spec: ExpertSpec, x: np.ndarray, weights: Matrices) -> np.ndarray:
    """One expert on tokens: float32 [T, H] -> [T, H], before the router's weight."""
    return np.asarray(inner(spec, x, weights) @ weights[inputs_and_output(spec)[1]].T)
