"""Which shapes the JAX engine refuses, by the name of the field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from common import EngineError
from common.families import FAMILIES, Decoder, EncoderDecoder
from common.families.shape import Rope, Sparse
from jax_engine.models.spec import check_shape
from tests.switch_models import SIZES


def switch_shape() -> EncoderDecoder:
    raw = {"model_type": "switch_transformers"} | SIZES
    shape = FAMILIES["switch_transformers"].parse_config(raw, "config.json").shape
    assert isinstance(shape, EncoderDecoder)
    return shape


@dataclass(frozen=True)
class LaterSparse(Sparse):
    """A record that got a field after this engine was written."""

    shared_inner: int | None = None


def changed(record: str, **fields: Any) -> EncoderDecoder:
    """The shape with other values in one of its records."""
    shape = switch_shape()
    if record == "router":
        router = replace(shape.experts.router, **fields)
        return replace(shape, experts=replace(shape.experts, router=router))
    if record == "shape":
        return replace(shape, **fields)
    return replace(shape, **{record: replace(getattr(shape, record), **fields)})


@pytest.mark.parametrize(
    ("record", "fields", "named"),
    [
        ("attention", {"kv_heads": 2}, "attention.kv_heads = 2"),
        ("attention", {"qk_norm": "head"}, "attention.qk_norm = 'head'"),
        ("attention", {"bias": True}, "attention.bias = True"),
        ("attention", {"window": 8}, "attention.window = 8"),
        ("attention", {"clip": 1.0}, "attention.clip = 1.0"),
        ("attention", {"positions": Rope(())}, "attention.positions = Rope"),
        ("router", {"top_k": 2}, "experts.router.top_k = 2"),
        ("router", {"renormalise": True}, "experts.router.renormalise = True"),
        ("router", {"softmax": "picked"}, "experts.router.softmax = 'picked'"),
        ("router", {"gates": "float32"}, "experts.router.gates = 'float32'"),
        ("experts", {"activation": "tanh"}, "experts.activation = 'tanh'"),
        ("scalars", {"embedding": 2.0}, "scalars.embedding = 2.0"),
        ("scalars", {"residual": 0.5}, "scalars.residual = 0.5"),
        ("scalars", {"logits_divisor": 2.0}, "scalars.logits_divisor = 2.0"),
        ("shape", {"encoder": ()}, r"layers = \("),
        (
            "shape",
            {"encoder": (LaterSparse(0, shared_inner=8),)},
            r"layers\[0\].shared_inner = 8",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    record: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(EngineError, match=f"tenant 'ana': the jax engine does not compute {named}"):
        check_shape(changed(record, **fields), "ana")


def test_what_is_computed_is_taken() -> None:
    assert check_shape(switch_shape(), "ana") == switch_shape()


def test_a_decoder_is_sent_to_the_other_engine() -> None:
    shape = FAMILIES["mixtral"].parse_config({"model_type": "mixtral"}, "config.json").shape
    assert isinstance(shape, Decoder)
    with pytest.raises(EngineError, match=r"tenant .ana. is a Decoder; .* use backend=.torch."):
        check_shape(shape, "ana")
