"""What a family is: how its config reads, which tensors it has, and which of them are experts at
which position."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpertSpec:
    """What tenants must agree on to share experts.

    expert_layers: names of the sparse layers in position order (Switch: encoder before decoder).
    projections: (name, shape) of the matrices of one expert, each `[out, in]`.
    """

    family: str
    expert_layers: tuple[str, ...]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    top_k: int
    projections: tuple[tuple[str, Shape], ...]

    @property
    def num_layers(self) -> int:
        """Number of sparse layers, the first axis of every plan."""
        return len(self.expert_layers)

    @property
    def num_positions(self) -> int:
        return self.num_layers * self.num_experts

    @property
    def copy_elements(self) -> int:
        """Number of weights in one copy of one position."""
        total = 0
        for _, shape in self.projections:
            size = 1
            for n in shape:
                size *= n
            total += size
        return total

    def differences(self, other: ExpertSpec) -> list[str]:
        """The fields in which two specs differ, as `field: mine != theirs`."""
        if self.family != other.family:  # then nothing else compares
            return [f"family: {self.family} != {other.family}"]
        found = []
        for field in self.__dataclass_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                if field == "expert_layers" and len(mine) != len(theirs):
                    mine, theirs, field = len(mine), len(theirs), "num_layers"
                found.append(f"{field}: {mine} != {theirs}")
        return found


@dataclass(frozen=True)
class ModelConfig(ABC):
    """One tenant's config, checked. Subclasses add their family's fields."""

    experts: ExpertSpec
    vocab_size: int
    max_positions: int
    raw: Mapping[str, Any]

    is_encoder_decoder: ClassVar[bool] = False
    """Whether a prompt is read by an encoder, so that it takes no room from the answer."""

    @property
    def head_is_tied(self) -> bool:
        """Whether `lm_head.weight`, where it is a canonical tensor, is another one's values
        again."""
        return False


@dataclass(frozen=True)
class Region:
    """A canonical tensor as a run of rows in a tensor of a file: `file_tensor[index, start:stop]`
    or the whole of it.

    index and rows are None for a tensor stored on its own.
    """

    file_tensor: str
    shape: Shape
    index: int | None = None
    rows: tuple[int, int] | None = None


class Family(ABC):
    """The tensors of one architecture, under canonical names: those of the family's classic Hugging
    Face layout."""

    name: str

    default_eos_token_id: int | None = None
    """What transformers' config class takes where config.json does not have `eos_token_id`."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of fields, as `attribute_map` of transformers' config class has them."""

    ignored: ClassVar[re.Pattern[str]]
    """Tensors that files may hold and no model reads; they are left out with a note."""

    attention: ClassVar[re.Pattern[str]]
    """Names of the attention's matrices."""

    def fields(self, raw: Mapping[str, Any], where: str) -> Fields:
        """A config.json with aliases resolved. Raises CheckpointError where an alias contradicts
        its field."""
        return Fields(raw, where, self.name, self.aliases)

    def parse_config(self, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """Read a config.json. Raises CheckpointError for a missing field or one that is not
        supported."""
        return self.parse(self.fields(raw, where))

    @abstractmethod
    def parse(self, fields: Fields) -> ModelConfig:
        """`parse_config`, which adds to `fields.notes` what was decided between fields that
        disagree."""

    @abstractmethod
    def check_fields(self, fields: Fields) -> None:
        """Refuse, by a CheckpointError that names it, a field that would change the maths; note
        unknown ones."""

    def tied_tables(self, config: ModelConfig) -> tuple[str, ...]:
        """Tensors that the config says are one. The first that a file holds is it; others may be
        there as well."""
        return ()

    def untied(self, config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
        """`config.raw` changed so that each of `names`, which are of `tied_tables`, is a tensor of
        its own."""
        raise NotImplementedError

    def file_name_of(self, name: str) -> str:
        """The name that a tensor of a file has in a whole model; transformers saves parts of one
        without its prefix."""
        return name

    @abstractmethod
    def expert_tensor(self, config: ModelConfig, layer: int, expert: int, projection: str) -> str:
        """Canonical name of one matrix of one expert."""

    @abstractmethod
    def non_expert_shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Canonical names and shapes of everything that is not an expert, in the order of
        computation."""

    @abstractmethod
    def locate(
        self, config: ModelConfig, file_shapes: Mapping[str, Shape], where: str
    ) -> dict[str, Region]:
        """Find every canonical tensor among the tensors of the files.

        file_shapes: names and shapes as on disk, in any layout of the family.
        Raises CheckpointError that names a tensor which is missing, superfluous or of another
        shape.
        """

    @abstractmethod
    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """config.json of an export, as `transformers` loads it."""

    def iter_expert_tensors(self, config: ModelConfig) -> Iterator[tuple[int, int, str, str]]:
        """(layer, expert, projection, canonical name) in row-major order of positions."""
        spec = config.experts
        for layer in range(spec.num_layers):
            for expert in range(spec.num_experts):
                for projection, _ in spec.projections:
                    yield (
                        layer,
                        expert,
                        projection,
                        self.expert_tensor(config, layer, expert, projection),
                    )

    def all_shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Every canonical tensor with its shape, experts included."""
        shapes = self.non_expert_shapes(config)
        by_projection = dict(config.experts.projections)
        for _, _, projection, name in self.iter_expert_tensors(config):
            shapes[name] = by_projection[projection]
        return shapes


class Fields:
    """Typed access to config.json whose errors name the file, the field and what was found.

    raw: with aliases under the names of their fields. notes: for people, what was decided.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        family: str = "",
        aliases: Mapping[str, str] | None = None,
    ):
        self.where, self.family = where, family
        self.notes: list[str] = []
        self.defaulted: dict[str, int] = {}  # sizes that the file does not state
        self.given = raw
        self.raw: dict[str, Any] = dict(raw)
        for alias, field in (aliases or {}).items():
            value = self.raw.pop(alias, None)
            if value is None:
                continue
            if self.raw.get(field, value) != value:
                raise self.error(
                    alias,
                    f"is {value!r}, but {field!r}, another name of it, is {self.raw[field]!r}; "
                    "keep one of them",
                )
            self.raw[field] = value

    def error(self, field: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: field {field!r} {why}")

    def positive_int(self, field: str, default: int | None = None) -> int:
        value = self.raw.get(field)
        if value is None:
            if default is None:
                raise self.error(
                    field, "is missing; a config.json that belongs to the weights states it"
                )
            value = default
            if field not in self.raw:
                self.defaulted[field] = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(field, f"is {value!r}; expected a whole number above 0")
        return value

    def optional_positive_int(self, field: str) -> int | None:
        return None if self.raw.get(field) is None else self.positive_int(field)

    def number(self, field: str, default: float) -> float:
        value = self.raw.get(field)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(field, f"is {value!r}; expected a number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.raw.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(field, f"is {value!r}; expected true or false")
        return value

    def text(self, field: str, default: str) -> str:
        value = self.raw.get(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(field, f"is {value!r}; expected a string")
        return value
