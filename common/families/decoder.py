"""What families of decoders have in common: the fields of their config.json, and tensors named by
tables."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from common.families.family import ExpertSpec, Family, ModelConfig, Region
from common.families.fields import Fields
from common.families.rope import parse_rope
from common.families.shape import (
    EMBED,
    GATE,
    HEAD,
    UP,
    Attention,
    Decoder,
    Dims,
    Experts,
    Mlp,
    Router,
    Scalars,
    alternate,
)

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# The fields that every decoder's `parse` reads.
READ = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings
    num_experts_per_tok rope_parameters rope_scaling rope_theta original_max_position_embeddings
    partial_rotary_factor sliding_window layer_types is_encoder_decoder
    """.split()
)

GATE_UP = "gate_up"
"""A role of files alone: the rows of gate, then those of up."""

NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "input_norm": "model.layers.{n}.input_layernorm.weight",
    "post_norm": "model.layers.{n}.post_attention_layernorm.weight",
    **{role: f"model.layers.{{n}}.self_attn.{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"model.layers.{{n}}.self_attn.{role}_proj.bias" for role in "qkvo"},
    **{f"{role}_norm": f"model.layers.{{n}}.self_attn.{role}_norm.weight" for role in "qk"},
    **{f"dense_{p}": f"model.layers.{{n}}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
"""Role -> name of a tensor, as Llama and most after it have them. {n}: number of the layer."""

PER_EXPERT: Mapping[str, str] = {
    **NAMES,
    "router": "model.layers.{n}.mlp.gate.weight",
    **{p: f"model.layers.{{n}}.mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down")},
}
"""A tensor for each matrix of each expert. {e}: number of the expert."""

FUSED: Mapping[str, str] = {
    **NAMES,
    "router": "model.layers.{n}.mlp.gate.weight",
    GATE_UP: "model.layers.{n}.mlp.experts.gate_up_proj",
    "down": "model.layers.{n}.mlp.experts.down_proj",
}
"""All experts of a layer in one tensor [E, out, in]: what transformers 5 holds in memory, and
writes with `save_original_format=False`."""


class DecoderFamily(Family):
    """A family of shape `Decoder`. What config.json leaves out has the default of transformers'
    config class."""

    # Rotary frequencies were saved as buffers by early versions of transformers; they follow from
    # the config. Transformer Engine keeps its own state beside layers; a value head is what TRL's
    # PPO trains beside the model.
    ignored = re.compile(r"rotary_emb\.inv_freq$|\._extra_state$|^v_head\.")
    read = READ

    layouts: ClassVar[Sequence[Mapping[str, str]]]
    """Role -> name of a tensor, for each layout on disk; the first is the canonical one.

    {n}: number of the layer, {e}: of the expert. An expert's name without {e} is that of a stack of
    all experts [E, out, in]; `GATE_UP` in a layout stands for gate and up.
    """

    defaults: ClassVar[Mapping[str, Any]]
    """Of the config class, for the fields that `parse` reads, `rope_theta` among them. Without
    `num_key_value_heads` there are as many as query heads."""

    count_field: str = "num_local_experts"
    size_field: str = "intermediate_size"
    """The fields that hold the number of experts, and their inner size."""

    @abstractmethod
    def router(self, fields: Fields, top_k: int) -> Router:
        """How experts are picked."""

    def attention(self, fields: Fields, usual: Attention) -> Attention:
        """The attention, given the usual one of these sizes."""
        return usual

    def scalars(self, fields: Fields) -> Scalars:
        """What the family multiplies by."""
        return Scalars()

    def layers(self, fields: Fields, count: int) -> tuple[Mlp, ...]:
        """Which layers are sparse."""
        return alternate([True] * count, 0)

    def window(self, fields: Fields) -> int | None:
        """The sliding window of every layer. Most of these models of transformers have none."""
        window = fields.optional_positive_int("sliding_window")
        if window is not None:
            raise fields.error(
                "sliding_window",
                f"is {window}, which is not supported: transformers' {self.title} has no window; "
                "set it to null",
            )
        return None

    def parse(self, fields: Fields) -> ModelConfig:
        defaults = self.defaults
        hidden, count, num_layers, top_k, inner = (
            fields.positive_int(name, default=defaults[name])
            for name in (
                "hidden_size",
                self.count_field,
                "num_hidden_layers",
                "num_experts_per_tok",
                self.size_field,
            )
        )
        if top_k > count:
            raise fields.error("num_experts_per_tok", f"is {top_k}, more than the {count} experts")
        activation = fields.text("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise fields.error(
                "hidden_act", f"is {activation!r}; supported: {', '.join(ACTIVATIONS)}"
            )
        if fields.flag("is_encoder_decoder", False):
            raise fields.error("is_encoder_decoder", f"is true; {self.title} has no encoder")
        if fields.raw.get("quantization_config"):
            raise fields.error(
                "quantization_config",
                "is set; quantised checkpoints are not supported, give the original",
            )
        vocab_size, max_positions = (
            fields.positive_int(name, default=defaults[name])
            for name in ("vocab_size", "max_position_embeddings")
        )
        attention = self.attention(fields, self._usual_attention(fields, hidden, max_positions))
        self._check_layer_types(fields, attention.window, num_layers)
        shape = Decoder(
            vocab_size=vocab_size,
            hidden=hidden,
            max_positions=max_positions,
            attention=attention,
            experts=Experts(
                count=count,
                inner=inner,
                activation="silu" if activation == "swish" else activation,
                gated=True,
                router=self.router(fields, top_k),
            ),
            layers=self.layers(fields, num_layers),
            norm_eps=fields.number("rms_norm_eps", defaults["rms_norm_eps"]),
            tied_head=fields.flag("tie_word_embeddings", False),
            scalars=self.scalars(fields),
        )
        experts = shape.experts
        spec = ExpertSpec(
            family=self.name,
            expert_layers=tuple(f"model.layers.{n}" for n in shape.sparse_layers),
            num_experts=count,
            hidden_size=hidden,
            intermediate_size=inner,
            activation=experts.activation,
            top_k=top_k,
            projections=experts.projections(hidden),
            model_layers=num_layers,
        )
        return ModelConfig(spec, shape, dict(fields.given))

    def _usual_attention(self, fields: Fields, hidden: int, max_positions: int) -> Attention:
        heads = fields.positive_int(
            "num_attention_heads", default=self.defaults["num_attention_heads"]
        )
        # null is as many as query heads, absence the class's default.
        absent = "num_key_value_heads" not in fields.raw
        kv_default = self.defaults.get("num_key_value_heads", heads) if absent else heads
        kv_heads = fields.positive_int("num_key_value_heads", default=kv_default)
        if heads % kv_heads:
            raise fields.error(
                "num_key_value_heads",
                f"is {kv_heads}, which does not divide {heads} attention heads",
            )
        head_dim = fields.optional_positive_int("head_dim")
        if head_dim is None:
            if hidden % heads:
                raise fields.error(
                    "num_attention_heads",
                    f"is {heads}, which does not divide hidden_size {hidden}",
                )
            head_dim = hidden // heads
        if head_dim % 2:
            raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even size")
        return Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            positions=parse_rope(fields, max_positions, self.defaults["rope_theta"]),
            window=self.window(fields),
        )

    def _check_layer_types(self, fields: Fields, window: int | None, num_layers: int) -> None:
        """These models of transformers have one window for all layers, whatever the field says."""
        types = fields.raw.get("layer_types")
        every = "full_attention" if window is None else "sliding_attention"
        if types is not None and list(types) != [every] * num_layers:
            raise fields.error(
                "layer_types",
                f"is {types!r}; with sliding_window {window} all {num_layers} layers of a "
                f"{self.title} have {every!r}",
            )

    def tied_tables(self, config: ModelConfig) -> tuple[str, ...]:
        assert isinstance(config.shape, Decoder)
        if not config.shape.tied_head:
            return ()
        return self.tensor_name(config, EMBED), self.tensor_name(config, HEAD)

    def file_name_of(self, name: str) -> str:
        return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name

    def tensor_name(
        self, config: ModelConfig, role: str, layer: int | None = None, expert: int | None = None
    ) -> str:
        return self.layouts[0][role].format(n=layer, e=expert)

    @property
    def num_layouts(self) -> int:
        return len(self.layouts)

    def region(
        self,
        config: ModelConfig,
        role: str,
        layer: int | None,
        expert: int | None,
        dims: Dims,
        layout: int,
    ) -> Region:
        names = self.layouts[layout]
        fused = expert is not None and role in (GATE, UP) and GATE_UP in names
        template = names[GATE_UP if fused else role]
        name = template.format(n=layer, e=expert)
        if expert is None or "{e}" in template:
            return Region(name, dims, whole=dims)
        rows, columns = dims
        start = rows if fused and role == UP else 0
        whole = (config.experts.num_experts, 2 * rows if fused else rows, columns)
        return Region(name, dims, expert, (start, start + rows), whole)
