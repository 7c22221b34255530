"""The feed-forward of layers without experts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from torch_engine.segments import Segments, joined, present

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def dense(segments: Segments, layer: int, x: Tensor) -> Tensor:
    """The feed-forward of a layer without experts: [T, H] -> [T, H]."""
    if len({s.weights.inner(layer) for s in segments.all}) > 1:
        return joined([dense(Segments([s]), layer, x[at]) for s, at in segments.slices()])
    first, weights = segments.all[0].weights, [s.weights.layers[layer] for s in segments.all]
    gate_up, down = [w.dense_gate_up for w in weights], [w.dense_down for w in weights]
    gate, up = segments.linear(x, present(gate_up)).chunk(2, dim=-1)
    inner = ACTIVATIONS[first.shape.experts.activation](gate) * up
    return segments.linear(inner, present(down))
