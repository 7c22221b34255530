"""Settings of rotary embeddings, as config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.families.fields import Fields
from common.families.shape import Rope

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


def parse_rope(fields: Fields, max_positions: int, default_theta: float) -> Rope:
    """What transformers makes of all the fields for it (RotaryEmbeddingConfigMixin in
    modeling_rope_utils.py).

    A `rope_scaling` that is not empty takes the place of `rope_parameters`, whole; what stands in
    it goes before what stands beside it, and `rope_type` before the older `type`.
    default_theta: of transformers' config class.
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
            f"has settings for each type of layer ({', '.join(nested)}); "
            f"{fields.family} has one for all",
        )
    kind = rope.pop("type", None)
    if rope.setdefault("rope_type", kind or "default") != (kind or rope["rope_type"]):
        fields.notes.append(
            f"rope type {rope['rope_type']!r} is taken and not 'type' {kind!r}, as in transformers"
        )
    beside = fields.raw.get("rope_theta")
    if (
        rope.setdefault("rope_theta", default_theta if beside is None else beside) != beside
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
            "rope_parameters",
            f"asks for a partial_rotary_factor, which {fields.family} does not use",
        )
    return Rope(tuple(sorted(rope.items())))
