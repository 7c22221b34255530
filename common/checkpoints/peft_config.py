"""adapter_config.json of PEFT: what is applied, what has no effect on answers, what is refused.

Source: peft 0.21, `LoraConfig` (tuners/lora/config.py), `get_pattern_key` (utils/other.py) and
`check_target_module_exists` (tuners/tuners_utils.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.checkpoints.weight_files import read_json
from common.errors import CheckpointError

MERGE = (
    "merge the adapter into its base with PEFT (merge_and_unload, then save_pretrained) and give "
    "the merged directory"
)

# Read below.
_READ = """
    peft_type base_model_name_or_path revision r lora_alpha rank_pattern alpha_pattern use_rslora
    target_modules exclude_modules target_parameters modules_to_save layers_to_transform
    layers_pattern init_lora_weights fan_in_fan_out task_type ensure_weight_tying
    """.split()
# Tensors say it (bias, lora_bias), or it is about training and starting values alone.
_HARMLESS = """
    bias lora_bias lora_dropout inference_mode auto_mapping peft_version runtime_config
    qalora_group_size megatron_core eva_config corda_config lora_ga_config loftq_config
    """.split()
# What each would change; all are refused where they are set.
_REFUSED = {
    "use_dora": "DoRA scales each row of the merged weights",
    "use_qalora": "QALoRA pools inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA is a variant of LoRA",
    "monteclora_config": "MonteCLoRA draws weights at random",
    "arrow_config": "Arrow picks adapters token by token",
    "alora_invocation_tokens": "aLoRA is active for some tokens only",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it replaces rows of the embeddings",
    "megatron_config": "Megatron's layers are laid out otherwise",
}
# Starting values that leave the base's weights as they are.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_NOTHING: tuple[Any, ...] = (None, False, "", 0, [], {})

Names = str | tuple[str, ...] | None


@dataclass(frozen=True)
class AdapterConfig:
    """path: of adapter_config.json. rank, alpha: where no pattern matches a module.

    targets, excluded: names of modules, or one regular expression. layers: numbers of the layers
    that `targets` counts in, None for all. notes: for people.
    """

    path: Path
    base: str | None
    revision: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    targets: Names
    excluded: Names
    parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    tied: bool
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def read(cls, path: Path) -> AdapterConfig:
        """Raises CheckpointError that names the file, the field and the mend."""
        raw = read_json(path)
        fields = _Fields(path, raw)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise fields.error("peft_type", f"is {kind!r}; adapters of type LORA are served")
        for name, why in _REFUSED.items():
            if raw.get(name) not in _NOTHING:
                raise fields.error(name, f"is {raw[name]!r}, which is not supported: {why}")
        start = raw.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise CheckpointError(
                f"{path}: field 'init_lora_weights' is {start!r}, which changes the base's weights "
                "before the adapter is added; save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion, or merge it"
            )
        if raw.get("task_type") not in _TASKS:
            raise fields.error("task_type", f"is {raw['task_type']!r}; text is generated here")
        known = {*_READ, *_HARMLESS, *_REFUSED}
        unknown = sorted(n for n in raw if n not in known and raw[n] not in _NOTHING)
        if unknown:
            raise fields.error(unknown[0], f"is {raw[unknown[0]]!r}, a field not known here")
        layers = raw.get("layers_to_transform")
        if type(layers) is int:
            layers = [layers]
        if layers is not None and not (
            isinstance(layers, list) and all(type(n) is int for n in layers)
        ):
            raise fields.error("layers_to_transform", f"is {layers!r}; expected numbers of layers")
        patterns = fields.names("layers_pattern")
        notes = []
        if raw.get("fan_in_fan_out"):
            notes.append("fan_in_fan_out is true; PEFT sets it to false for these models' layers")
        return cls(
            path,
            fields.text("base_model_name_or_path"),
            fields.text("revision"),
            fields.rank("r", raw.get("r", 8)),
            fields.alpha("lora_alpha", raw.get("lora_alpha", 8)),
            {p: fields.rank("rank_pattern", v) for p, v in fields.patterns("rank_pattern")},
            {p: fields.alpha("alpha_pattern", v) for p, v in fields.patterns("alpha_pattern")},
            fields.flag("use_rslora"),
            fields.names("target_modules"),
            fields.names("exclude_modules"),
            fields.listed("target_parameters"),
            fields.listed("modules_to_save"),
            tuple(layers) if layers else None,
            (patterns,) if isinstance(patterns, str) else patterns or (),
            fields.flag("ensure_weight_tying"),
            tuple(notes),
        )

    def rank_of(self, key: str) -> tuple[int, str]:
        """Rank of a module or parameter, and the field that says so."""
        found = _first_match(self.rank_pattern, key)
        return (self.rank, "r") if found is None else (self.rank_pattern[found], "rank_pattern")

    def scaling_of(self, key: str) -> float:
        """What the product of a module's factors is multiplied by."""
        found = _first_match(self.alpha_pattern, key)
        alpha = self.alpha if found is None else self.alpha_pattern[found]
        rank = self.rank_of(key)[0]
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def has_module(self, module: str) -> bool:
        """Whether PEFT adapts a module of this name."""
        if _named(self.excluded, module) or any(
            re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.modules_to_save
        ):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return True
        if not _named(self.targets, module):
            return False
        if isinstance(self.targets, str) or self.layers is None or module in (self.targets or ()):
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:
                return int(found[1]) in self.layers
        return False

    def has_parameter(self, parameter: str) -> bool:
        """Whether PEFT adapts a parameter of this name."""
        return any(parameter == p or parameter.endswith(f".{p}") for p in self.parameters)


def _named(names: Names, key: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names or ())


def _first_match(patterns: Mapping[str, Any], key: str) -> str | None:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", key)), None)


class _Fields:
    """Fields of adapter_config.json, refused by name where they are of another kind."""

    def __init__(self, path: Path, raw: Mapping[str, Any]):
        self.path, self.raw = path, raw

    def error(self, name: str, what: str, mend: str = MERGE) -> CheckpointError:
        return CheckpointError(f"{self.path}: field {name!r} {what}; {mend}")

    def text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"is {value!r}, expected text", "fetch the file again")
        return value or None

    def flag(self, name: str) -> bool:
        value = self.raw.get(name) or False
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r}, expected true or false", "fetch the file again")
        return value

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            mend = "give the rank of the tensors"
            raise self.error(name, f"is {value!r}, expected a whole number from 1", mend)
        return value

    def alpha(self, name: str, value: Any) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            mend = "give the number that the adapter was trained with"
            raise self.error(name, f"is {value!r}, expected a number", mend)
        return float(value)

    def patterns(self, name: str) -> list[tuple[str, Any]]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, f"is {value!r}, expected an object", "fetch the file again")
        for pattern in value:
            self._expression(name, pattern)
        return list(value.items())

    def listed(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(name, f"is {value!r}, expected names", "fetch the file again")
        return tuple(value)

    def names(self, name: str) -> Names:
        value = self.raw.get(name)
        if isinstance(value, str):
            return self._expression(name, value)
        return None if value is None else self.listed(name)

    def _expression(self, name: str, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            mend = "give the pattern that the adapter was trained with"
            raise self.error(name, f"holds {pattern!r}, no expression ({error})", mend) from error
        return pattern
