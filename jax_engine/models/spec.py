"""What a model is built from, and which shapes this engine computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from common.errors import EngineError
from common.families.shape import (
    Attention,
    Dense,
    EncoderDecoder,
    Experts,
    RelativePositions,
    Router,
    Scalars,
    Shape,
    Sparse,
)
from jax_engine.experts.dispatch import ACTIVATIONS, Dispatch, FeedForward
from jax_engine.experts.products import Products


@dataclass(frozen=True)
class ModelSpec:
    """What a model is built from.

    slots: number of slots of each sparse layer.
    vocab_size: the widest of all tenants, so that a switch meets the same shapes.
    capacity: tokens an expert takes of each row (None: all), as `expert_capacity` in transformers.
    """

    shape: EncoderDecoder
    products: Products
    dispatch: Dispatch
    slots: tuple[int, ...]
    vocab_size: int
    capacity: int | None = None

    @property
    def feed_forward(self) -> FeedForward:
        """What an expert computes."""
        experts = self.shape.experts
        return FeedForward(experts.activation, experts.gated, experts.inner)

    @property
    def first_of_decoder(self) -> int:
        """The number of the decoder's first layer."""
        return len(self.shape.encoder)


def computed_shape(shape: EncoderDecoder) -> EncoderDecoder:
    """What decides the computation, the vocabulary apart: equal for tenants that share compiled
    steps."""
    return replace(shape, vocab_size=0, max_positions=0, decoder_start_token_id=0)


def check_shape(shape: Shape, tenant: str) -> EncoderDecoder:
    """Refuse a shape that this engine does not compute.

    Raises:
        EngineError: that names the tenant and the field.
    """
    if not isinstance(shape, EncoderDecoder):
        raise EngineError(
            f"tenant {tenant!r} is a {type(shape).__name__}; the jax engine computes "
            "EncoderDecoder, use backend='torch'"
        )
    for field, value in _unsupported(shape):
        raise EngineError(
            f"tenant {tenant!r}: the jax engine does not compute {field} = {value!r}; "
            "leave this tenant out of the store"
        )
    return shape


def _unsupported(shape: EncoderDecoder) -> Iterator[tuple[str, object]]:
    """(field, value) of what is not computed.

    Records are built anew from the fields that are. So a field that the shape gets later is refused
    wherever it does not have its default.
    """
    a, e, r = shape.attention, shape.experts, shape.experts.router
    router = Router(1, dtype=r.dtype, gates="hidden", bias=r.bias, capacity=r.capacity)
    pairs: list[tuple[str, object, object]] = [
        ("attention", a, Attention(a.heads, a.heads, a.head_dim, a.scale, a.positions)),
        ("experts.router", r, router),
        ("experts", e, Experts(e.count, e.inner, e.activation, e.gated, r)),
        ("scalars", shape.scalars, Scalars(head_input=shape.scalars.head_input)),
    ]
    for n, mlp in enumerate(shape.layers):
        same = Sparse(mlp.position) if isinstance(mlp, Sparse) else Dense(mlp.inner)
        pairs.append((f"layers[{n}]", mlp, same))
    whole = EncoderDecoder(
        shape.vocab_size,
        shape.hidden,
        shape.max_positions,
        a,
        e,
        shape.encoder,
        shape.decoder,
        shape.norm_eps,
        shape.own_tables,
        shape.scalars,
        shape.decoder_start_token_id,
    )
    pairs.append(("shape", shape, whole))
    for where, found, computed in pairs:
        for field in fields(found):  # type: ignore[arg-type]
            value = getattr(found, field.name)
            if value != getattr(computed, field.name):
                yield f"{where}.{field.name}", value
    if not isinstance(a.positions, RelativePositions):
        yield "attention.positions", a.positions
    if e.activation not in ACTIVATIONS:
        yield "experts.activation", e.activation
    if not shape.encoder or not shape.decoder:
        yield "layers", shape.layers
