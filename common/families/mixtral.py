"""Mixtral: decoder-only, every layer sparse, top-k of E experts with w1 (gate), w2 (down), w3 (up).

Layouts on disk, both read (transformers 5, conversion_mapping.py and models/mixtral/modeling_mixtral.py):
- classic, what the hub holds: `model.layers.N.block_sparse_moe.experts.E.w{1,2,3}.weight`,
  `block_sparse_moe.gate.weight`;
- fused, what transformers 5 holds in memory and writes with `save_original_format=False`:
  `model.layers.N.mlp.experts.gate_up_proj [E, 2I, H]` (rows of w1, then of w3), `down_proj [E, H, I]` (= w2),
  `mlp.gate.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import CheckpointError
from common.families.base import ExpertSpec, Family, Fields, ModelConfig, Region, Shape

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# Rotary frequencies were saved as buffers by early versions of transformers; they follow from the config.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")

# Types whose frequencies are fixed once the config is known, with the numbers that each needs beside rope_theta;
# "dynamic" and "longrope" change with the length of the text.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class MixtralConfig(ModelConfig):
    """The fields of a Mixtral config.json that change the maths; names as in `transformers.MixtralConfig`."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    sliding_window: int | None
    tie_word_embeddings: bool


class MixtralFamily(Family):
    """See the module's docstring."""

    name = "mixtral"
    default_eos_token_id = 2

    def parse_config(self, raw: Mapping[str, Any], where: str) -> MixtralConfig:
        fields = Fields(raw, where)
        hidden_size = fields.positive_int("hidden_size")
        num_layers = fields.positive_int("num_hidden_layers")
        intermediate_size = fields.positive_int("intermediate_size")
        num_experts = fields.positive_int("num_local_experts", default=8)
        top_k = fields.positive_int("num_experts_per_tok", default=2)
        if top_k > num_experts:
            raise fields.error("num_experts_per_tok", f"is {top_k}, more than the {num_experts} experts")
        activation = fields.text("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise fields.error("hidden_act", f"is {activation!r}; supported: {', '.join(ACTIVATIONS)}")
        heads = fields.positive_int("num_attention_heads")
        kv_heads = fields.positive_int("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} attention heads")
        head_dim = fields.optional_positive_int("head_dim")
        if head_dim is None:
            if hidden_size % heads:
                raise fields.error(
                    "num_attention_heads", f"is {heads}, which does not divide hidden_size {hidden_size}"
                )
            head_dim = hidden_size // heads
        if head_dim % 2:
            raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even size")
        if raw.get("quantization_config"):
            raise fields.error(
                "quantization_config", "is set; quantised checkpoints are not supported, give the original"
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
            vocab_size=fields.positive_int("vocab_size"),
            max_positions=fields.positive_int("max_position_embeddings", default=4096 * 32),
            raw=dict(raw),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            rope_parameters=_rope_parameters(fields),
            sliding_window=fields.optional_positive_int("sliding_window"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )

    def expert_tensor(self, config: ModelConfig, layer: int, expert: int, projection: str) -> str:
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"

    def non_expert_shapes(self, config: ModelConfig) -> dict[str, Shape]:
        c = _mixtral(config)
        hidden = c.experts.hidden_size
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
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
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
        return shapes

    def locate(self, config: ModelConfig, file_shapes: Mapping[str, Shape], where: str) -> dict[str, Region]:
        c = _mixtral(config)
        inter = c.experts.intermediate_size
        regions: dict[str, Region] = {}
        used: set[str] = set()
        for name, shape in self.all_shapes(c).items():
            source = name
            if name == "lm_head.weight" and c.tie_word_embeddings:
                # transformers ties the head to the embedding whatever the file holds.
                used.add(name)
                source = "model.embed_tokens.weight"
            if source in file_shapes:
                regions[name] = Region(source, _expect(source, file_shapes[source], shape, where))
                used.add(source)
                continue
            regions[name] = _locate_fused(name, shape, inter, c.experts.num_experts, file_shapes, where)
            used.add(regions[name].file_tensor)
        unused = sorted(n for n in file_shapes if n not in used and not DERIVED.search(n))
        if unused:
            raise CheckpointError(
                f"{where}: {len(unused)} tensors that a Mixtral of this config does not have, first {unused[0]!r}; "
                "does config.json belong to this checkpoint?"
            )
        return regions

    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        raw = {k: v for k, v in config.raw.items() if k not in ("torch_dtype", "_name_or_path")}
        return raw | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": dtype}


def _mixtral(config: ModelConfig) -> MixtralConfig:
    assert isinstance(config, MixtralConfig)
    return config


def _rope_parameters(fields: Fields) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or the older `rope_theta` with `rope_scaling`, in the newer form."""
    given = fields.raw.get("rope_parameters")
    if given is not None and not isinstance(given, Mapping):
        raise fields.error("rope_parameters", f"is {given!r}; expected a mapping")
    scaling = fields.raw.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise fields.error("rope_scaling", f"is {scaling!r}; expected a mapping")
    rope: dict[str, Any] = dict(scaling or {}) | dict(given or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    # 1e6 is the default of transformers.MixtralConfig.
    rope.setdefault("rope_theta", fields.number("rope_theta", 1e6))
    if rope["rope_type"] not in ROPE_TYPES:
        raise fields.error(
            "rope_parameters", f"asks for rope type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}"
        )
    for name in ("rope_theta", *ROPE_TYPES[rope["rope_type"]]):
        value = rope.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise fields.error(
                "rope_parameters",
                f"of type {rope['rope_type']!r} needs a number above 0 as {name!r}, found {value!r}; "
                "take config.json from where the weights come from",
            )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("rope_parameters", "asks for a partial_rotary_factor, which Mixtral does not use")
    return rope


def _expect(name: str, found: Shape, expected: Shape, where: str) -> Shape:
    if tuple(found) != expected:
        raise CheckpointError(
            f"{where}: tensor {name} is {list(found)}, config.json implies {list(expected)}; "
            "does config.json belong to this checkpoint?"
        )
    return expected


_EXPERT = re.compile(r"^(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$")


def _locate_fused(
    name: str, shape: Shape, inter: int, num_experts: int, file_shapes: Mapping[str, Shape], where: str
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
        f"{where}: tensor {name} is missing; the checkpoint is incomplete or config.json is another model's"
    )
