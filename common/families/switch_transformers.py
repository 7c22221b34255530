"""Switch Transformer: T5 in which some layers have a top-1 router and experts in place of the
feed-forward.

Canonical names are those of transformers' `SwitchTransformersForConditionalGeneration`
(models/switch_transformers/modeling_switch_transformers.py). A gated feed-forward, which T5X's
Switch configs allow and transformers' Switch has no module for, has the names of transformers' T5:
wi_0, wi_1, wo.

Positions count the sparse layers of the encoder, then those of the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from common.errors import CheckpointError
from common.families.family import ExpertSpec, Family, ModelConfig
from common.families.fields import Fields
from common.families.shape import (
    Attention,
    EncoderDecoder,
    Experts,
    RelativePositions,
    Router,
    Scalars,
    alternate,
)

Side = Literal["encoder", "decoder"]
SIDES: tuple[Side, Side] = ("encoder", "decoder")

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")

# Not a field of Hugging Face's: which layers are sparse, where its rule of every n-th layer cannot
# say it.
SPARSE_LAYERS = "moetel_sparse_layers"

# Relative positions have no end; this bounds what one request can take (attention grows with the
# square).
MAX_POSITIONS = 4096

# Not a field of Hugging Face's either: tables of their own where config.json says that all are
# `shared.weight`. The output is scaled as for a tied head all the same, since transformers goes by
# the config there.
UNTIED = "moetel_untied"

SHARED, HEAD = "shared.weight", "lm_head.weight"
TABLES = (SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
TABLE_OF_ROLE = dict(zip(("embed", "encoder_embed", "decoder_embed", "head"), TABLES, strict=True))
NORMS = {
    "encoder_norm": "encoder.final_layer_norm.weight",
    "norm": "decoder.final_layer_norm.weight",
}

# The fields that `parse` reads.
READ = frozenset(
    """
    d_model d_ff d_kv num_heads num_layers num_decoder_layers num_experts vocab_size dense_act_fn
    feed_forward_proj is_gated_act router_bias router_dtype expert_capacity
    relative_attention_num_buckets relative_attention_max_distance layer_norm_epsilon
    tie_word_embeddings num_sparse_encoder_layers num_sparse_decoder_layers encoder_sparse_step
    decoder_sparse_step decoder_start_token_id pad_token_id scale_decoder_outputs is_encoder_decoder
    moetel_untied moetel_sparse_layers
    """.split()
)


@dataclass(frozen=True)
class SwitchTransformersConfig(ModelConfig):
    """The fields of a Switch config.json that change the maths; names as in
    `transformers.SwitchTransformersConfig`.

    sparse_layers: numbers of the sparse layers of each side. tie_word_embeddings: the decoder's
    output is scaled, and all tables but `untied` are `shared.weight`. expert_capacity is what
    transformers drops tokens by; serving is dropless unless asked otherwise.
    """

    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    sparse_layers: Mapping[Side, tuple[int, ...]]
    gated: bool
    expert_capacity: int
    router_bias: bool
    router_dtype: str
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    tie_word_embeddings: bool
    untied: tuple[str, ...] = ()

    @property
    def own_tables(self) -> tuple[str, ...]:
        """The tables beside `shared.weight` that are tensors of their own."""
        return self.untied if self.tie_word_embeddings else TABLES[1:]

    def layers(self, side: Side) -> int:
        """Number of layers of one side."""
        return self.num_layers if side == "encoder" else self.num_decoder_layers


class SwitchTransformersFamily(Family):
    """See the module's docstring. What config.json leaves out has the default of
    SwitchTransformersConfig."""

    name = "switch_transformers"
    title = "Switch Transformer"
    architecture = "SwitchTransformersForConditionalGeneration"
    read = READ
    default_eos_token_id = 1
    aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
    # Saved by transformers before 4.0 and never used: cross-attention has no position bias.
    ignored = re.compile(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
    )

    def parse(self, fields: Fields) -> SwitchTransformersConfig:
        raw = fields.raw
        d_model, d_ff = (
            fields.positive_int("d_model", default=768),
            fields.positive_int("d_ff", default=2048),
        )
        num_layers = fields.positive_int("num_layers", default=12)
        # null is as many as the encoder's, absence the class's default.
        num_decoder_layers = fields.positive_int(
            "num_decoder_layers", default=num_layers if "num_decoder_layers" in raw else 12
        )
        num_experts = fields.positive_int("num_experts", default=8)
        if not fields.flag("is_encoder_decoder", True):
            raise fields.error(
                "is_encoder_decoder", "is false; a Switch Transformer has an encoder and a decoder"
            )
        tied = fields.flag("tie_word_embeddings", True)
        if fields.flag("scale_decoder_outputs", tied) != tied:
            raise fields.error(
                "scale_decoder_outputs",
                f"is {not tied} and tie_word_embeddings {tied}; Switch Transformers scale where "
                "they tie",
            )
        untied = raw.get(UNTIED) or ()
        if not isinstance(untied, list | tuple) or not set(untied) <= set(TABLES[1:]):
            raise fields.error(
                UNTIED, f"is {untied!r}; expected names among {', '.join(TABLES[1:])}"
            )
        if raw.get("quantization_config"):
            raise fields.error(
                "quantization_config",
                "is set; quantised checkpoints are not supported, give the original",
            )
        activation, gated = _activation(fields)
        sparse = {
            side: _sparse_layers(fields, side, count)
            for side, count in zip(SIDES, (num_layers, num_decoder_layers), strict=True)
        }
        if not any(sparse.values()):
            raise fields.error(
                "num_sparse_encoder_layers",
                "leaves no sparse layer; a model without experts has none to share",
            )
        router_dtype = fields.text("router_dtype", "float32")
        if router_dtype not in ("float32", "bfloat16", "float16"):
            raise fields.error(
                "router_dtype", f"is {router_dtype!r}; supported: float32, bfloat16, float16"
            )
        start = raw.get("decoder_start_token_id")
        vocab_size = fields.positive_int("vocab_size", default=32128)
        if start is None:
            start = raw.get("pad_token_id") or 0  # T5's: decoding starts from padding
        if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < vocab_size:
            raise fields.error(
                "decoder_start_token_id", f"is {start!r}; expected a token id below {vocab_size}"
            )
        buckets = fields.positive_int("relative_attention_num_buckets", default=32)
        distance = fields.positive_int("relative_attention_max_distance", default=128)
        if buckets < 4 or buckets % 2 or distance <= buckets // 2:
            raise fields.error(
                "relative_attention_num_buckets",
                f"is {buckets} with relative_attention_max_distance {distance}; "
                "buckets must be even, at least 4, and less than twice the distance",
            )
        heads, d_kv = (
            fields.positive_int("num_heads", default=12),
            fields.positive_int("d_kv", default=64),
        )
        capacity, bias = (
            fields.positive_int("expert_capacity", default=64),
            fields.flag("router_bias", False),
        )
        epsilon = fields.number("layer_norm_epsilon", 1e-6)
        own = tuple(name for name in TABLES[1:] if not tied or name in untied)
        layers = alternate(
            [
                n in sparse[side]
                for side, count in zip(SIDES, (num_layers, num_decoder_layers), strict=True)
                for n in range(count)
            ],
            d_ff,
        )
        shape = EncoderDecoder(
            vocab_size=vocab_size,
            hidden=d_model,
            max_positions=MAX_POSITIONS,
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=d_kv,
                scale=1.0,
                positions=RelativePositions(buckets, distance),
            ),
            experts=Experts(
                count=num_experts,
                inner=d_ff,
                activation=activation,
                gated=gated,
                router=Router(1, dtype=router_dtype, gates="hidden", bias=bias, capacity=capacity),
            ),
            encoder=layers[:num_layers],
            decoder=layers[num_layers:],
            norm_eps=epsilon,
            own_tables=tuple(role for role, name in TABLE_OF_ROLE.items() if name in own),
            scalars=Scalars(head_input=d_model**-0.5 if tied else 1.0),
            decoder_start_token_id=start,
        )
        experts = ExpertSpec(
            family=self.name,
            expert_layers=tuple(_mlp(side, n) for side in SIDES for n in sparse[side]),
            num_experts=num_experts,
            hidden_size=d_model,
            intermediate_size=d_ff,
            activation=activation,
            top_k=1,
            projections=shape.experts.projections(d_model),
            model_layers=len(layers),
        )
        return SwitchTransformersConfig(
            experts=experts,
            shape=shape,
            raw=dict(fields.given),
            d_kv=d_kv,
            d_ff=d_ff,
            num_heads=heads,
            num_layers=num_layers,
            num_decoder_layers=num_decoder_layers,
            sparse_layers=sparse,
            gated=gated,
            expert_capacity=capacity,
            router_bias=bias,
            router_dtype=router_dtype,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=distance,
            layer_norm_epsilon=epsilon,
            tie_word_embeddings=tied,
            untied=tuple(name for name in TABLES if name in untied),
        )

    def tied_tables(self, config: ModelConfig) -> tuple[str, ...]:
        c = as_switch(config)
        return tuple(n for n in TABLES if n not in c.untied) if c.tie_word_embeddings else ()

    def untied(self, config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
        return {**config.raw, UNTIED: [*names, *as_switch(config).untied]}

    def file_name_of(self, name: str) -> str:
        return name.removeprefix("switch_transformers.")

    def alike_tables(self, config: ModelConfig) -> tuple[str, ...]:
        # Untied, older versions of transformers saved the embeddings, which they tied all the same,
        # once.
        return self.tied_tables(config) or TABLES[:3]

    def tensor_name(
        self, config: ModelConfig, role: str, layer: int | None = None, expert: int | None = None
    ) -> str:
        if layer is None:
            return {**TABLE_OF_ROLE, **NORMS}[role]
        c = as_switch(config)
        in_decoder = layer >= c.num_layers
        side, n = SIDES[in_decoder], layer - c.num_layers * in_decoder
        mlp = _mlp(side, n)
        if expert is not None:
            return f"{mlp}.experts.expert_{expert}.{matrix_name(c, role)}.weight"
        block = f"{side}.block.{n}.layer"
        if role.startswith("dense_"):
            return f"{mlp}.{matrix_name(c, role.removeprefix('dense_'))}.weight"
        if role.startswith("router"):
            return f"{mlp}.router.classifier.{'bias' if role == 'router_bias' else 'weight'}"
        if role == "post_norm":
            return f"{mlp.removesuffix('.mlp')}.layer_norm.weight"
        number, attention = (
            (1, "EncDecAttention") if role.startswith("cross_") else (0, "SelfAttention")
        )
        if role in ("input_norm", "cross_norm"):
            return f"{block}.{number}.layer_norm.weight"
        if role == "position_bias":
            return f"{block}.0.SelfAttention.relative_attention_bias.weight"
        return f"{block}.{number}.{attention}.{role.removeprefix('cross_')}.weight"

    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        c = as_switch(config)
        for side in SIDES:
            if (
                _by_step(self.fields(c.raw, "config"), side, c.layers(side))
                != c.sparse_layers[side]
            ):
                raise CheckpointError(
                    f"sparse {side} layers {list(c.sparse_layers[side])} of {c.layers(side)} are "
                    "not every n-th from "
                    "the second, which is all that Hugging Face's config can say; keep this model "
                    "as T5X or Orbax"
                )
        found = super().hf_config(config, dtype) | {"is_encoder_decoder": True}
        return {k: v for k, v in found.items() if k not in (SPARSE_LAYERS, UNTIED)}


def as_switch(config: ModelConfig) -> SwitchTransformersConfig:
    """The config of a Switch tenant; anything else is our own mistake."""
    assert isinstance(config, SwitchTransformersConfig)
    return config


def matrix_name(config: SwitchTransformersConfig, role: str) -> str:
    """What files call a matrix of a feed-forward."""
    if role == "down":
        return "wo"
    return {"gate": "wi_0", "up": "wi_1"}[role] if config.gated else "wi"


def _mlp(side: str, n: int) -> str:
    return f"{side}.block.{n}.layer.{1 if side == 'encoder' else 2}.mlp"


def _activation(fields: Fields) -> tuple[str, bool]:
    """(activation, gated) from dense_act_fn and from the fields by which T5 configs say it
    (models/t5)."""
    name = fields.text("dense_act_fn", "relu")
    proj = fields.text("feed_forward_proj", "")
    gated = (
        fields.raw.get("is_gated_act") is True
        or name.startswith("gated-")
        or proj.startswith("gated-")
    )
    name = name.removeprefix("gated-")
    if gated and name == "relu" and proj.startswith("gated-"):
        name = proj.removeprefix("gated-")
    if gated and name == "gelu":
        name = "gelu_new"  # what T5 v1.1 and transformers mean by gated-gelu
    if name not in ACTIVATIONS:
        raise fields.error(
            "dense_act_fn", f"is {name!r}; supported: {', '.join(ACTIVATIONS)}, each also gated-"
        )
    return {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}.get(name, name), gated


def _by_step(fields: Fields, side: Side, num_layers: int) -> tuple[int, ...]:
    """Sparse layers by transformers' rule: those with `i % step == 1`, all if the step is 1
    (SwitchTransformersStack).

    A step in the file holds; without one it is layers // sparse layers, or layers where that is 0.
    """
    step = fields.raw.get(f"{side}_sparse_step")
    if step is None:
        # transformers divides before it reads num_hidden_layers, the other name of this field.
        divided = num_layers if side == "decoder" or "num_layers" in fields.given else 12
        sparse = fields.raw.get(f"num_sparse_{side}_layers", 3)
        if not isinstance(sparse, int) or isinstance(sparse, bool) or sparse < 0:
            raise fields.error(
                f"num_sparse_{side}_layers", f"is {sparse!r}; expected a whole number from 0"
            )
        step = divided // sparse if sparse else divided
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise fields.error(f"{side}_sparse_step", f"is {step!r}; expected a whole number from 0")
    return tuple(i for i in range(num_layers) if step and (step == 1 or i % step == 1))


def _sparse_layers(fields: Fields, side: Side, num_layers: int) -> tuple[int, ...]:
    given = fields.raw.get(SPARSE_LAYERS)
    if given is None:
        return _by_step(fields, side, num_layers)
    layers: Any = given.get(side) if isinstance(given, Mapping) else None
    ok = isinstance(layers, list | tuple) and all(
        type(i) is int and 0 <= i < num_layers for i in layers
    )
    if not ok or sorted(set(layers)) != list(layers):
        raise fields.error(
            SPARSE_LAYERS,
            f"is {given!r}; expected ascending layer numbers for 'encoder' and 'decoder'",
        )
    return tuple(layers)


FAMILY = SwitchTransformersFamily()
