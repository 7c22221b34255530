"""Mixtral: decoder-only, every layer sparse, top-k of E experts with w1 (gate), w2 (down), w3 (up).

Layouts on disk, both read (transformers 5, conversion_mapping.py and
models/mixtral/modeling_mixtral.py):
- classic, what the hub holds: `model.layers.N.block_sparse_moe.experts.E.w{1,2,3}.weight`,
  `block_sparse_moe.gate.weight`;
- fused, what transformers 5 holds in memory and writes with `save_original_format=False`:
  `model.layers.N.mlp.experts.gate_up_proj [E, 2I, H]` (rows of w1, then of w3), `down_proj [E, H,
  I]` (= w2), `mlp.gate.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.errors import CheckpointError
from common.families.base import ExpertSpec, Family, Fields, ModelConfig, Region, Shape
from common.families.config_fields import check_fields

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# The fields that `parse` reads.
READ = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings
    sliding_window num_experts_per_tok num_local_experts rope_parameters rope_scaling rope_theta
    original_max_position_embeddings partial_rotary_factor layer_types use_sliding_window
    is_encoder_decoder
    """.split()
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Types whose frequencies are fixed once the config is known, with the numbers that each needs
# beside rope_theta; "dynamic" and "longrope" change with the length of the text.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


# What the types may have beside.
ROPE_NUMBERS = (
    *(
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)


@dataclass(frozen=True)
class MixtralConfig(ModelConfig):
    """The fields of a Mixtral config.json that change the maths; names as in
    `transformers.MixtralConfig`."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    sliding_window: int | None
    tie_word_embeddings: bool

    @property
    def head_is_tied(self) -> bool:
        return self.tie_word_embeddings


class MixtralFamily(Family):
    """See the module's docstring. What config.json leaves out has the default of transformers'
    MixtralConfig."""

    name = "mixtral"
    default_eos_token_id = 2
    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    # Rotary frequencies were saved as buffers by early versions of transformers; they follow from
    # the config. Transformer Engine keeps its own state beside layers; a value head is what TRL's
    # PPO trains beside the model.
    ignored = re.compile(r"rotary_emb\.inv_freq$|\._extra_state$|^v_head\.")

    attention = re.compile(r"\.self_attn\.")

    def parse(self, fields: Fields) -> MixtralConfig:
        raw = fields.raw
        hidden_size = fields.positive_int("hidden_size", default=4096)
        num_layers = fields.positive_int("num_hidden_layers", default=32)
        intermediate_size = fields.positive_int("intermediate_size", default=14336)
        num_experts = fields.positive_int("num_local_experts", default=8)
        top_k = fields.positive_int("num_experts_per_tok", default=2)
        if top_k > num_experts:
            raise fields.error(
                "num_experts_per_tok", f"is {top_k}, more than the {num_experts} experts"
            )
        activation = fields.text("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise fields.error(
                "hidden_act", f"is {activation!r}; supported: {', '.join(ACTIVATIONS)}"
            )
        heads = fields.positive_int("num_attention_heads", default=32)
        # null is as many as query heads, absence the class's default.
        kv_default = heads if "num_key_value_heads" in raw else 8
        kv_heads = fields.positive_int("num_key_value_heads", default=kv_default)
        if heads % kv_heads:
            raise fields.error(
                "num_key_value_heads",
                f"is {kv_heads}, which does not divide {heads} attention heads",
            )
        head_dim = fields.optional_positive_int("head_dim")
        if head_dim is None:
            if hidden_size % heads:
                raise fields.error(
                    "num_attention_heads",
                    f"is {heads}, which does not divide hidden_size {hidden_size}",
                )
            head_dim = hidden_size // heads
        if head_dim % 2:
            raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even size")
        if fields.flag("is_encoder_decoder", False):
            raise fields.error("is_encoder_decoder", "is true; Mixtral has no encoder")
        if raw.get("quantization_config"):
            raise fields.error(
                "quantization_config",
                "is set; quantised checkpoints are not supported, give the original",
            )
        experts = ExpertSpec(
            family=self.name,
            expert_layers=tuple(f"model.layers.{n}" for n in range(num_layers)),
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation="silu" if activation == "swish" else activation,
            top_k=top_k,
            projections=(
                ("w1", (intermediate_size, hidden_size)),
                ("w2", (hidden_size, intermediate_size)),
                ("w3", (intermediate_size, hidden_size)),
            ),
        )
        return MixtralConfig(
            experts=experts,
            vocab_size=fields.positive_int("vocab_size", default=32000),
            max_positions=(
                max_positions := fields.positive_int("max_position_embeddings", default=4096 * 32)
            ),
            raw=dict(fields.given),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            rope_parameters=_rope_parameters(fields, max_positions),
            sliding_window=_sliding_window(fields, num_layers),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )

    def check_fields(self, fields: Fields) -> None:
        check_fields(fields, READ, neutral={"decoder_sparse_step": (1,)})

    def tied_tables(self, config: ModelConfig) -> tuple[str, ...]:
        return (EMBEDDING, HEAD) if _mixtral(config).tie_word_embeddings else ()

    def untied(self, config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
        return {**config.raw, "tie_word_embeddings": False}

    def file_name_of(self, name: str) -> str:
        return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name

    def expert_tensor(self, config: ModelConfig, layer: int, expert: int, projection: str) -> str:
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"

    def non_expert_shapes(self, config: ModelConfig) -> dict[str, Shape]:
        c = _mixtral(config)
        hidden = c.experts.hidden_size
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes: dict[str, Shape] = {EMBEDDING: (c.vocab_size, hidden)}
        for layer in c.experts.expert_layers:
            shapes |= {
                f"{layer}.input_layernorm.weight": (hidden,),
                f"{layer}.self_attn.q_proj.weight": (q_size, hidden),
                f"{layer}.self_attn.k_proj.weight": (kv_size, hidden),
                f"{layer}.self_attn.v_proj.weight": (kv_size, hidden),
                f"{layer}.self_attn.o_proj.weight": (hidden, q_size),
                f"{layer}.post_attention_layernorm.weight": (hidden,),
                f"{layer}.block_sparse_moe.gate.weight": (c.experts.num_experts, hidden),
            }
        shapes["model.norm.weight"] = (hidden,)
        shapes[HEAD] = (c.vocab_size, hidden)
        return shapes

    def locate(
        self, config: ModelConfig, file_shapes: Mapping[str, Shape], where: str
    ) -> dict[str, Region]:
        c = _mixtral(config)
        inter = c.experts.intermediate_size
        regions: dict[str, Region] = {}
        used: set[str] = set()
        # The checkpoint's reader has compared tied tables and found them equal.
        tied = self.tied_tables(c)
        table = next((n for n in tied if n in file_shapes), EMBEDDING)
        used |= set(tied)
        for name, shape in self.all_shapes(c).items():
            source = table if name in tied else name
            if source in file_shapes:
                regions[name] = Region(source, _expect(source, file_shapes[source], shape, where))
                used.add(source)
                continue
            regions[name] = _locate_fused(
                name, shape, inter, c.experts.num_experts, file_shapes, where
            )
            used.add(regions[name].file_tensor)
        unused = sorted(n for n in file_shapes if n not in used and not self.ignored.search(n))
        if unused:
            raise CheckpointError(
                f"{where}: {len(unused)} tensors that a Mixtral of this config does not have, "
                f"first {unused[0]!r}; "
                "does config.json belong to this checkpoint?"
            )
        return regions

    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        raw = {k: v for k, v in config.raw.items() if k not in ("torch_dtype", "_name_or_path")}
        return raw | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": dtype,
        }


def _mixtral(config: ModelConfig) -> MixtralConfig:
    assert isinstance(config, MixtralConfig)
    return config


def _rope_parameters(fields: Fields, max_positions: int) -> dict[str, Any]:
    """What transformers makes of all the fields for it (RotaryEmbeddingConfigMixin in
    modeling_rope_utils.py).

    A `rope_scaling` that is not empty takes the place of `rope_parameters`, whole; what stands in
    it goes before what stands beside it, and `rope_type` before the older `type`.
    """
    for field in ("rope_parameters", "rope_scaling"):
        value = fields.raw.get(field)
        if value is not None and not isinstance(value, Mapping):
            raise fields.error(field, f"is {value!r}; expected a mapping")
    scaling, given = fields.raw.get("rope_scaling"), fields.raw.get("rope_parameters")
    rope: dict[str, Any] = {k: v for k, v in (scaling or given or {}).items() if v is not None}
    if scaling and given and dict(scaling) != dict(given):
        fields.notes.append(
            "rope_scaling is taken and rope_parameters, which differs, is not, as in transformers"
        )
    nested = sorted(k for k, v in rope.items() if isinstance(v, Mapping))
    if nested:
        raise fields.error(
            "rope_parameters",
            f"has settings for each type of layer ({', '.join(nested)}); Mixtral has one for all",
        )
    kind = rope.pop("type", None)
    if rope.setdefault("rope_type", kind or "default") != (kind or rope["rope_type"]):
        fields.notes.append(
            f"rope type {rope['rope_type']!r} is taken and not 'type' {kind!r}, as in transformers"
        )
    # 1e6 is the default of transformers.MixtralConfig.
    beside = fields.raw.get("rope_theta")
    if (
        rope.setdefault("rope_theta", 1e6 if beside is None else beside) != beside
        and beside is not None
    ):
        fields.notes.append(
            f"rope_theta {rope['rope_theta']!r} within rope_parameters is taken and not {beside!r} "
            "beside them, "
            "as in transformers"
        )
    beside = fields.raw.get("original_max_position_embeddings")
    if rope["rope_type"] in ("llama3", "yarn"):
        if beside is not None:
            rope["original_max_position_embeddings"] = beside
        rope.setdefault("original_max_position_embeddings", max_positions)
    factor = fields.raw.get("partial_rotary_factor")
    if factor is not None:
        rope.setdefault("partial_rotary_factor", factor)
    if rope["rope_type"] not in ROPE_TYPES:
        raise fields.error(
            "rope_parameters",
            f"asks for rope type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}",
        )
    for name in ("rope_theta", *ROPE_TYPES[rope["rope_type"]]):
        value = rope.get(name)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < float("inf")
        ):
            raise fields.error(
                "rope_parameters",
                f"of type {rope['rope_type']!r} needs a number above 0 as {name!r}, found "
                f"{value!r}; "
                "take config.json from where the weights come from",
            )
    for name in ROPE_NUMBERS:
        value = rope.get(name, 1)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise fields.error("rope_parameters", f"has {name!r} {value!r}; expected a number")
    unknown = sorted(set(rope) - {"rope_type", "rope_theta", "truncate", *ROPE_NUMBERS})
    if unknown:
        fields.notes.append(f"rope settings that nothing reads: {', '.join(unknown)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error(
            "rope_parameters", "asks for a partial_rotary_factor, which Mixtral does not use"
        )
    return rope


def _sliding_window(fields: Fields, num_layers: int) -> int | None:
    """transformers' Mixtral has one window for all layers, and no field that turns it off."""
    window = fields.optional_positive_int("sliding_window")
    if window is not None and fields.raw.get("use_sliding_window") is False:
        fields.notes.append(
            f"sliding_window {window} is applied: Mixtral does not read use_sliding_window (set "
            "the window to null)"
        )
    types = fields.raw.get("layer_types")
    every = "full_attention" if window is None else "sliding_attention"
    if types is not None and list(types) != [every] * num_layers:
        raise fields.error(
            "layer_types",
            f"is {types!r}; with sliding_window {window} all {num_layers} layers of a Mixtral have "
            f"{every!r}",
        )
    return window


def _expect(name: str, found: Shape, expected: Shape, where: str) -> Shape:
    if tuple(found) != expected:
        raise CheckpointError(
            f"{where}: tensor {name} is {list(found)}, config.json implies {list(expected)}; "
            "does config.json belong to this checkpoint?"
        )
    return expected


_EXPERT = re.compile(r"^(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$")


def _locate_fused(
    name: str,
    shape: Shape,
    inter: int,
    num_experts: int,
    file_shapes: Mapping[str, Shape],
    where: str,
) -> Region:
    """The place of a canonical tensor in the fused layout; an error if it is not there either."""
    match = _EXPERT.match(name)
    if match:
        layer, expert, projection = match[1], int(match[2]), match[3]
        fused = f"{layer}.mlp.experts.{'down_proj' if projection == 'w2' else 'gate_up_proj'}"
        if fused in file_shapes:
            rows, columns = shape
            whole = (num_experts, rows if projection == "w2" else 2 * inter, columns)
            _expect(fused, file_shapes[fused], whole, where)
            start = inter if projection == "w3" else 0
            return Region(fused, shape, index=expert, rows=(start, start + rows))
    renamed = name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
    if renamed in file_shapes:
        return Region(renamed, _expect(renamed, file_shapes[renamed], shape, where))
    raise CheckpointError(
        f"{where}: tensor {name} is missing; the checkpoint is incomplete or config.json is "
        "another model's"
    )
