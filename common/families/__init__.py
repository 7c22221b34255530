"""Families of MoE models that tenants can belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError
from common.families.base import ExpertSpec, Family, ModelConfig, Region, Shape
from common.families.mixtral import MixtralConfig, MixtralFamily
from common.families.switch_transformers import SwitchTransformersConfig, SwitchTransformersFamily

FAMILIES: dict[str, Family] = {
    family.name: family for family in (MixtralFamily(), SwitchTransformersFamily())
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
    "ExpertSpec",
    "Family",
    "MixtralConfig",
    "MixtralFamily",
    "ModelConfig",
    "Region",
    "Shape",
    "SwitchTransformersConfig",
    "SwitchTransformersFamily",
    "family_of",
]
