"""A config.json for a T5X tree, which stores none: what the shapes tell, and T5's defaults for the
rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError
from common.families import FAMILIES, Dims
from common.families.switch_transformers import SIDES, SPARSE_LAYERS, Side, as_switch

FAMILY = FAMILIES["switch_transformers"]

# What no shape tells: transformers.SwitchTransformersConfig's defaults, which are those of T5 and
# of Switch.
DEFAULTS: dict[str, Any] = {
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "expert_capacity": 64,
    "router_dtype": "float32",
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# T5 1.0 and Switch use ReLU; T5 1.1's gated feed-forward uses GELU (gelu_new, as transformers reads
# "gated-gelu").
PLAIN = {"dense_act_fn": "relu"}
GATED = {"dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu"}
GATING_FIELDS = ("feed_forward_proj", "is_gated_act", "dense_act_fn")

# flaxformer's names where one array holds a matrix of all layers; else each layer is layers_N.
SCANNED = re.compile(r"(encoder|decoder)\.(encoder|decoder|layers|blocks?|layer_stack)\.")


def config_for(
    shapes: Mapping[str, Dims],
    where: str,
    given: Mapping[str, Any] | None = None,
    given_where: str = "",
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A config in Hugging Face's terms for the arrays of a T5X tree, and notes on what was taken by
    default.

    shapes: name in the tree (see `t5x_names`) -> shape. given: a config.json, whose fields all stay
        as they are.
    Raises CheckpointError if the arrays are no Switch Transformer's, or contradict `given` (field,
    value and shape are named).
    """
    told = _Told(shapes, where)
    raw: dict[str, Any] = dict(given or {})
    if raw.get("model_type", FAMILY.name) != FAMILY.name:
        raise CheckpointError(
            f"{given_where}: model_type is {raw['model_type']!r}, but the checkpoint holds a "
            "Switch Transformer "
            f"({FAMILY.name}); give the config.json that belongs to it"
        )
    for alias, field in FAMILY.aliases.items():
        if raw.get(alias) is not None:
            raw.setdefault(field, raw[alias])
    for field, (value, reason) in told.fields.items():
        stated = raw.get(field)
        if stated is None:
            raw[field] = value
        elif stated != value or isinstance(stated, bool) != isinstance(value, bool):
            raise CheckpointError(
                f"{given_where}: field {field!r} is {stated!r}, but the checkpoint has {value!r} "
                f"({reason}); "
                "give the config.json that belongs to it"
            )
    # A field that the file has as null stays so: that is how it says that there is no such token.
    defaulted = {
        f: v for f, v in (DEFAULTS | _activation(raw, told, given_where)).items() if f not in raw
    }
    raw |= defaulted
    raw |= {"model_type": FAMILY.name, "is_encoder_decoder": True}
    notes = []
    if defaulted:
        listed = ", ".join(f"{field} {value}" for field, value in defaulted.items())
        notes.append(
            f"not stated by the checkpoint, T5's defaults taken (--config overrides): {listed}"
        )
    for side in SIDES:
        notes += _sparse(raw, told, side, given_where)
    if (
        any(sparse_step(told.sparse[side], told.layers[side]) is None for side in SIDES)
        and SPARSE_LAYERS not in raw
    ):
        raw[SPARSE_LAYERS] = {side: list(told.sparse[side]) for side in SIDES}
    return raw, tuple(notes)


def sparse_step(sparse: tuple[int, ...], num_layers: int) -> int | None:
    """The `*_sparse_step` with which transformers makes exactly these layers sparse, or None.

    transformers: `i % step == 1`, all if the step is 1, none if it is 0 (SwitchTransformersStack).
    """
    if not sparse:
        return 0
    steps = [num_layers // len(sparse), *range(1, num_layers + 1)]
    return next(
        (s for s in steps if sparse == tuple(i for i in range(num_layers) if s == 1 or i % s == 1)),
        None,
    )


class _Told:
    """What the shapes tell: fields with the array they follow from, and the sparse layers of each
    side."""

    def __init__(self, shapes: Mapping[str, Dims], where: str):
        self.shapes, self.where = shapes, where
        scanned = next((n for n in shapes if SCANNED.match(n)), None)
        if scanned is not None:
            raise CheckpointError(
                f"{where}: array target.{scanned} is {list(shapes[scanned])}, one for all layers: "
                "this model was "
                "trained with scanned layers (scan_layers), which Moetel does not read; restore it "
                "into the same model "
                "without them, save that, and give it"
            )
        vocab_size, d_model = self._shape("token_embedder.embedding", 2)
        heads, buckets = self._shape("encoder.relpos_bias.rel_embedding", 2)
        inner = self._shape("encoder.layers_0.attention.query.kernel", 2)[1]
        if not heads or inner % heads:
            raise CheckpointError(
                f"{where}: target.encoder.layers_0.attention.query.kernel has {inner} columns, "
                f"which {heads} heads "
                "(first axis of target.encoder.relpos_bias.rel_embedding) do not divide"
            )
        self.layers: dict[Side, int] = {side: self._count(side) for side in SIDES}
        self.sparse: dict[Side, tuple[int, ...]] = {side: self._sparse(side) for side in SIDES}
        first = next((f"{s}.layers_{self.sparse[s][0]}.mlp" for s in SIDES if self.sparse[s]), None)
        if first is None:
            raise CheckpointError(
                f"{where}: no layer has experts (no array mlp.expert); this is a plain T5, Moetel "
                "serves Switch "
                "Transformers"
            )
        self.gated = f"{first}.expert.wi_0.kernel" in shapes
        wi = "wi_0" if self.gated else "wi"
        router = f"{first}.router.router_weights.w.kernel"
        num_experts = self._shape(router, 2)[1]
        dense = sorted(n for n in shapes if re.fullmatch(rf"\w+\.layers_\d+\.mlp\.{wi}\.kernel", n))
        source = dense[0] if dense else f"{first}.expert.{wi}.kernel"
        d_ff = self._shape(source, 2 if dense else 3)[-1]
        query = "encoder.layers_0.attention.query.kernel"
        self.fields: dict[str, tuple[Any, str]] = {
            "vocab_size": (vocab_size, self._say("token_embedder.embedding")),
            "d_model": (d_model, self._say("token_embedder.embedding")),
            "d_kv": (inner // heads, f"{self._say(query)}, {heads} heads"),
            "d_ff": (d_ff, self._say(source)),
            "num_layers": (
                self.layers["encoder"],
                f"{self.layers['encoder']} layers in target.encoder",
            ),
            "num_decoder_layers": (
                self.layers["decoder"],
                f"{self.layers['decoder']} layers in target.decoder",
            ),
            "num_heads": (heads, self._say("encoder.relpos_bias.rel_embedding")),
            "num_experts": (num_experts, self._say(router)),
            "relative_attention_num_buckets": (
                buckets,
                self._say("encoder.relpos_bias.rel_embedding"),
            ),
            "router_bias": self._presence(f"{first}.router.router_weights.w.bias", when_there=True),
            "tie_word_embeddings": self._presence("decoder.logits_dense.kernel", when_there=False),
        }

    def _shape(self, name: str, rank: int) -> Dims:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.where}: array target.{name} is missing; the checkpoint is incomplete, or "
                "no Switch Transformer "
                "of flaxformer's (without scanned layers)"
            )
        if len(shape) != rank:
            raise CheckpointError(
                f"{self.where}: array target.{name} is {list(shape)}, expected {rank} axes"
            )
        return shape

    def _say(self, name: str) -> str:
        return f"target.{name} is {list(self.shapes[name])}"

    def _presence(self, name: str, when_there: bool) -> tuple[bool, str]:
        there = name in self.shapes
        return when_there == there, f"target.{name} is {'there' if there else 'absent'}"

    def _count(self, side: Side) -> int:
        found = {int(m[1]) for n in self.shapes if (m := re.match(rf"{side}\.layers_(\d+)\.", n))}
        missing = sorted(set(range(max(found, default=0) + 1)) - found)
        if missing:
            raise CheckpointError(
                f"{self.where}: target.{side}.layers_{missing[0]} is missing; the checkpoint is "
                "incomplete"
            )
        return len(found)

    def _sparse(self, side: Side) -> tuple[int, ...]:
        return tuple(
            i
            for i in range(self.layers[side])
            if any(n.startswith(f"{side}.layers_{i}.mlp.expert.") for n in self.shapes)
        )


def _activation(raw: Mapping[str, Any], told: _Told, where: str) -> dict[str, Any]:
    """What to add so that the config is gated as the arrays are; a config that says otherwise is
    refused."""
    stated = {f: raw[f] for f in GATING_FIELDS if raw.get(f) is not None}
    if not stated:
        return GATED if told.gated else PLAIN
    says_gated = raw.get("is_gated_act") is True or any(
        isinstance(v, str) and v.startswith("gated-") for v in stated.values()
    )
    if says_gated == told.gated:
        return {}
    if told.gated and set(stated) == {"dense_act_fn"}:
        return {"is_gated_act": True}  # it names the function alone
    field = next(iter(stated))
    found = "wi_0 and wi_1 (gated)" if told.gated else "wi alone (not gated)"
    raise CheckpointError(
        f"{where}: field {field!r} is {stated[field]!r}, but the feed-forward layers of the "
        f"checkpoint have {found}; "
        "give the config.json that belongs to it"
    )


def _sparse(raw: dict[str, Any], told: _Told, side: Side, where: str) -> list[str]:
    """Make `raw` say which layers of a side are sparse. Returns notes; raises if the config says
    another number."""
    count_field, step_field = f"num_sparse_{side}_layers", f"{side}_sparse_step"
    layers, num_layers = told.sparse[side], told.layers[side]
    stated = [f for f in (SPARSE_LAYERS, count_field, step_field) if raw.get(f) is not None]
    if stated:
        says = as_switch(
            FAMILY.parse_config(_other_side_fixed(raw, told, side), where)
        ).sparse_layers[side]
        if says == layers:
            return []
        if SPARSE_LAYERS in stated or raw.get(count_field) != len(layers):
            raise CheckpointError(
                f"{where}: field {stated[0]!r} is {raw[stated[0]]!r}, which makes the {side} "
                f"layers {list(says)} "
                f"sparse, but the checkpoint has experts (mlp.expert) in layers {list(layers)} of "
                f"{num_layers}; "
                "give the config.json that belongs to it"
            )
    raw[count_field] = len(layers)
    step = sparse_step(layers, num_layers)
    if step is None:
        raw.pop(step_field, None)
    else:
        raw[step_field] = step
    if not stated:
        return []
    return [
        f"sparse {side} layers are {list(layers)}, as the arrays say; by transformers' rule "
        f"{count_field} "
        f"{len(layers)} would mean {list(says)}"
    ]


def _other_side_fixed(raw: Mapping[str, Any], told: _Told, side: Side) -> dict[str, Any]:
    """`raw` with a valid other side, so that the family can be asked about this one alone."""
    other = SIDES[1 - SIDES.index(side)]
    fixed = {
        k: v
        for k, v in raw.items()
        if k not in (f"num_sparse_{other}_layers", f"{other}_sparse_step")
    }
    return fixed | {f"{other}_sparse_step": 1}
