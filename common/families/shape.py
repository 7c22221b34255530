"""What a model computes, as data: a `Decoder` or an `EncoderDecoder`, and the roles of its tensors.

A family parses its config.json into one of these records, and engines compute what the record says.
A field is here because a family that is served needs it.

Roles are names of what a tensor is for. Numbers of layers count all layers of the model, those of
an encoder before those of a decoder. Positions count sparse layers alone, in the same order.
Legend: hidden H, query heads N, key-value heads G, head size D, experts E, inner size I,
vocabulary V.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Dims = tuple[int, ...]

# Of the whole model. Tables of an encoder and of a decoder are roles where they are tensors of
# their own.
EMBED, HEAD, NORM, ENCODER_NORM = "embed", "head", "norm", "encoder_norm"
ENCODER_EMBED, DECODER_EMBED = "encoder_embed", "decoder_embed"

# Of a layer: input_norm, post_norm, router and router_bias, and
ATTENTION = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
# with position_bias; of a decoder that attends to an encoder, cross_norm and
CROSS_ATTENTION = ("cross_q", "cross_k", "cross_v", "cross_o")

# Of an expert. [I, H]: gate, up; [H, I]: down. Without a gate, up goes through the activation.
GATE, UP, DOWN = "gate", "up", "down"
# Of the feed-forward of a layer that is not sparse.
DENSE = {GATE: "dense_gate", UP: "dense_up", DOWN: "dense_down"}


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings in the half-split form.

    parameters: transformers' `rope_parameters`, sorted by name, `rope_type` and `rope_theta` among
        them.
    """

    parameters: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class RelativePositions:
    """T5's: a bias for each head and bucket of distances, from one table for all layers of a
    side."""

    buckets: int
    max_distance: int


@dataclass(frozen=True)
class Attention:
    """scale: what the products of queries and keys are multiplied by.

    qk_norm: RMS norm of queries and keys, each head on its own or the whole projection.
    bias: on q, k, v and o. window: a query at p sees keys p - window < k <= p; None: all before it.
    clip: after the norms, q, k and v are held to -clip..clip.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    positions: Rope | RelativePositions
    qk_norm: Literal["none", "head", "whole"] = "none"
    bias: bool = False
    window: int | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Router:
    """Picks `top_k` experts of each token, and gives each a gate: the weight of its output.

    softmax: over the logits of all experts, or of the picked ones.
    renormalise: divide the gates by their sum.
    dtype: in which logits are computed: hidden (that of the hidden states), float32, bfloat16 or
        float16.
    gates: what gates are rounded to.
    capacity: tokens that an expert takes of a sequence where a model drops the others; None: all.
    """

    top_k: int
    renormalise: bool = False
    softmax: Literal["all", "picked"] = "all"
    dtype: str = "hidden"
    gates: Literal["hidden", "float32"] = "float32"
    bias: bool = False
    capacity: int | None = None


@dataclass(frozen=True)
class Experts:
    """What experts of a position are: `down (act(gate x) * (up x))`, or `down act(up x)`."""

    count: int
    inner: int
    activation: str
    gated: bool
    router: Router

    def projections(self, hidden: int) -> tuple[tuple[str, Dims], ...]:
        """(role, [out, in]) of an expert's matrices; the first goes through the activation."""
        return feed_forward(self.gated, hidden, self.inner)


@dataclass(frozen=True)
class Sparse:
    """A layer with a router and experts. position: its number among the sparse layers."""

    position: int


@dataclass(frozen=True)
class Dense:
    """A layer with one feed-forward for all tokens, of the experts' activation and gating."""

    inner: int


Mlp = Sparse | Dense


@dataclass(frozen=True)
class Scalars:
    """Numbers that a family multiplies by; all in the type of the hidden states.

    embedding: the embeddings. residual: what attention and feed-forward add to the hidden states.
    head_input: what the head reads. logits_divisor: what logits are divided by.
    """

    embedding: float = 1.0
    residual: float = 1.0
    head_input: float = 1.0
    logits_divisor: float = 1.0


@dataclass(frozen=True)
class Decoder:
    """Layers of attention and feed-forward, each after a norm and added to what it read.

    tied_head: the head is the embedding.
    """

    vocab_size: int
    hidden: int
    max_positions: int
    attention: Attention
    experts: Experts
    layers: tuple[Mlp, ...]
    norm_eps: float
    tied_head: bool = False
    scalars: Scalars = field(default_factory=Scalars)

    @cached_property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the sparse layers, by position."""
        return sparse_layers(self.layers)


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder that reads the prompt, and a decoder whose layers attend to it between attention
    and feed-forward.

    own_tables: which of encoder_embed, decoder_embed and head are tensors of their own; the others
        are `embed`.
    decoder_start_token_id: what answers are decoded from, unless generation_config.json says
        another.
    """

    vocab_size: int
    hidden: int
    max_positions: int
    attention: Attention
    experts: Experts
    encoder: tuple[Mlp, ...]
    decoder: tuple[Mlp, ...]
    norm_eps: float
    own_tables: tuple[str, ...] = ()
    scalars: Scalars = field(default_factory=Scalars)
    decoder_start_token_id: int = 0

    @property
    def layers(self) -> tuple[Mlp, ...]:
        """The encoder's layers, then the decoder's."""
        return self.encoder + self.decoder

    @cached_property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the sparse layers, by position."""
        return sparse_layers(self.layers)


Shape = Decoder | EncoderDecoder


def sparse_layers(layers: tuple[Mlp, ...]) -> tuple[int, ...]:
    """Numbers of the sparse ones among all layers, in order."""
    return tuple(n for n, mlp in enumerate(layers) if isinstance(mlp, Sparse))


def alternate(sparse: Iterable[bool], inner: int) -> tuple[Mlp, ...]:
    """The layers of a model, given which ones are sparse. inner: of the dense ones."""
    found: list[Mlp] = []
    position = 0
    for is_sparse in sparse:
        found.append(Sparse(position) if is_sparse else Dense(inner))
        position += is_sparse
    return tuple(found)


def feed_forward(gated: bool, hidden: int, inner: int) -> tuple[tuple[str, Dims], ...]:
    """(gate, up or down, [out, in]) of a feed-forward's matrices."""
    first = ((GATE, (inner, hidden)),) if gated else ()
    return (*first, (UP, (inner, hidden)), (DOWN, (hidden, inner)))


def non_expert_dims(shape: Shape) -> Iterator[tuple[str, int | None, Dims]]:
    """(role, layer, dimensions) of every tensor that is no expert's, in the order of computation.

    The layer is None for what belongs to the whole model.
    """
    hidden, table = shape.hidden, (shape.vocab_size, shape.hidden)
    yield EMBED, None, table
    if isinstance(shape, Decoder):
        for n in range(len(shape.layers)):
            yield from _layer(shape, n, cross=False)
        yield NORM, None, (hidden,)
        yield HEAD, None, table
        return
    sides = ((ENCODER_EMBED, shape.encoder, 0), (DECODER_EMBED, shape.decoder, len(shape.encoder)))
    for embed, layers, first in sides:
        if embed in shape.own_tables:
            yield embed, None, table
        for n in range(first, first + len(layers)):
            for role, layer, dims in _layer(shape, n, cross=first > 0):
                if role != "position_bias" or n == first:
                    yield role, layer, dims
        yield (NORM if first else ENCODER_NORM), None, (hidden,)
    if HEAD in shape.own_tables:
        yield HEAD, None, table


def _layer(shape: Shape, n: int, cross: bool) -> Iterator[tuple[str, int, Dims]]:
    a, hidden = shape.attention, shape.hidden
    wide, narrow = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield "input_norm", n, (hidden,)
    matrices: dict[str, Dims] = {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden)}
    for role, dims in (matrices | {"o": (hidden, wide)}).items():
        yield role, n, dims
        if a.bias:
            yield f"{role}_bias", n, dims[:1]
    if a.qk_norm != "none":
        whole = a.qk_norm == "whole"
        yield "q_norm", n, (wide if whole else a.head_dim,)
        yield "k_norm", n, (narrow if whole else a.head_dim,)
    if isinstance(a.positions, RelativePositions):
        yield "position_bias", n, (a.positions.buckets, a.heads)
    if cross:
        yield "cross_norm", n, (hidden,)
        for role, dims in (matrices | {"o": (hidden, wide)}).items():
            yield f"cross_{role}", n, dims
    yield "post_norm", n, (hidden,)
    mlp = shape.layers[n]
    if isinstance(mlp, Dense):
        for role, dims in feed_forward(shape.experts.gated, hidden, mlp.inner):
            yield DENSE[role], n, dims
        return
    yield "router", n, (shape.experts.count, hidden)
    if shape.experts.router.bias:
        yield "router_bias", n, (shape.experts.count,)
