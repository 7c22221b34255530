"""Families of MoE models that tenants can belong to: a file each, found by its `FAMILY`.

docs/add-a-family.md says how to add one. Most are a `DecoderFamily` of `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from common.errors import CheckpointError
from common.families.family import ExpertSpec, Family, ModelConfig, Region
from common.families.shape import Decoder, Dims, EncoderDecoder, Shape

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    if hasattr(module, "FAMILY")
}


def family_of(raw_config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names in `model_type`. Raises CheckpointError for an unknown
    one."""
    model_type = raw_config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}; this version serves "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[str(model_type)]


__all__ = [
    "FAMILIES",
    "Decoder",
    "Dims",
    "EncoderDecoder",
    "ExpertSpec",
    "Family",
    "ModelConfig",
    "Region",
    "Shape",
    "family_of",
]
