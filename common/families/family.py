"""What a family is: how its config.json reads into a shape, and which tensor has which role.

Tensors have canonical names in a store: those of the family's classic Hugging Face layout, one name
for each matrix of each expert. Files may hold them in other layouts, see `Family.region`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.errors import CheckpointError
from common.families.fields import Fields, check_fields
from common.families.shape import (
    ATTENTION,
    CROSS_ATTENTION,
    Dims,
    EncoderDecoder,
    Shape,
    non_expert_dims,
)


@dataclass(frozen=True)
class ExpertSpec:
    """What tenants must agree on to share experts.

    expert_layers: names of the sparse layers in position order (Switch: encoder before decoder).
    projections: (role, dimensions) of the matrices of one expert, each `[out, in]`; the first goes
        through the activation, the last is `down`.
    model_layers: number of all layers, dense ones included.
    """

    family: str
    expert_layers: tuple[str, ...]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    top_k: int
    projections: tuple[tuple[str, Dims], ...]
    model_layers: int = 0

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
        for _, dims in self.projections:
            size = 1
            for n in dims:
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
class ModelConfig:
    """One tenant's config, checked. raw: config.json as it was given."""

    experts: ExpertSpec
    shape: Shape
    raw: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def max_positions(self) -> int:
        return self.shape.max_positions

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a prompt is read by an encoder, so that it takes no room from the answer."""
        return isinstance(self.shape, EncoderDecoder)


@dataclass(frozen=True)
class Region:
    """A canonical tensor as a run of rows in a tensor of a file: `file_tensor[index, start:stop]`
    or the whole of it.

    index and rows are None for a tensor stored on its own. whole: dimensions of the file's tensor.
    """

    file_tensor: str
    shape: Dims
    index: int | None = None
    rows: tuple[int, int] | None = None
    whole: Dims = ()


class Family(ABC):
    """One architecture, as checkpoints name it. Subclasses say what differs, as data where they
    can."""

    name: str
    title: str
    """For errors: `a {title}`."""

    architecture: str
    """The class of transformers that loads an export."""

    default_eos_token_id: int | None = None
    """What transformers' config class takes where config.json does not have `eos_token_id`."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of fields, as `attribute_map` of transformers' config class has them."""

    read: ClassVar[frozenset[str]]
    """The fields of config.json that `parse` reads."""

    ignored: ClassVar[re.Pattern[str]]
    """Tensors that files may hold and no model reads; they are left out with a note."""

    saved_layout: int = 0
    """The layout of exports: one that transformers loads."""

    @property
    def num_layouts(self) -> int:
        """How many layouts of files `region` knows."""
        return 1

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

    def check_fields(self, fields: Fields) -> None:
        """Refuse, by a CheckpointError that names it, a field that would change the maths; note
        unknown ones."""
        check_fields(fields, self.read)

    @abstractmethod
    def tensor_name(
        self, config: ModelConfig, role: str, layer: int | None = None, expert: int | None = None
    ) -> str:
        """Canonical name of the tensor with a role (see `common.families.shape`).

        layer: number among all layers, None for what belongs to the whole model. expert: None for
            what is no expert's.
        """

    def region(
        self,
        config: ModelConfig,
        role: str,
        layer: int | None,
        expert: int | None,
        dims: Dims,
        layout: int,
    ) -> Region:
        """Where a canonical tensor of these dimensions lies in files of a layout, 0 the canonical
        one."""
        return Region(self.tensor_name(config, role, layer, expert), dims, whole=dims)

    def tied_tables(self, config: ModelConfig) -> tuple[str, ...]:
        """Tensors that the config says are one. The first that a file holds is it; others may be
        there as well."""
        return ()

    def alike_tables(self, config: ModelConfig) -> tuple[str, ...]:
        """Tables of which one is taken where another is missing: `tied_tables`, if not more."""
        return self.tied_tables(config)

    def untied(self, config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
        """`config.raw` changed so that each of `names`, which are of `tied_tables`, is a tensor of
        its own."""
        return {**config.raw, "tie_word_embeddings": False}

    def file_name_of(self, name: str) -> str:
        """The name that a tensor of a file has in a whole model; transformers saves parts of one
        without its prefix."""
        return name

    def hf_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """config.json of an export, as `transformers` loads it."""
        raw = {k: v for k, v in config.raw.items() if k not in ("torch_dtype", "_name_or_path")}
        return raw | {
            "architectures": [self.architecture],
            "model_type": self.name,
            "dtype": dtype,
        }

    # What follows from the above.

    def expert_tensor(
        self, config: ModelConfig, position_layer: int, expert: int, projection: str
    ) -> str:
        """Canonical name of one matrix of one expert, by the number of its layer among sparse
        ones."""
        return self.tensor_name(
            config, projection, config.shape.sparse_layers[position_layer], expert
        )

    def iter_expert_tensors(self, config: ModelConfig) -> Iterator[tuple[int, int, str, str]]:
        """(sparse layer, expert, projection, canonical name) in row-major order of positions."""
        spec = config.experts
        for layer in range(spec.num_layers):
            for expert in range(spec.num_experts):
                for projection, _ in spec.projections:
                    name = self.expert_tensor(config, layer, expert, projection)
                    yield layer, expert, projection, name

    def non_expert_shapes(self, config: ModelConfig) -> dict[str, Dims]:
        """Canonical names and dimensions of everything that is not an expert, in the order of
        computation."""
        return {
            self.tensor_name(config, role, layer): dims
            for role, layer, dims in non_expert_dims(config.shape)
        }

    def all_shapes(self, config: ModelConfig) -> dict[str, Dims]:
        """Every canonical tensor with its dimensions, experts included."""
        return {name: dims for name, _, dims in self._all(config)}

    def _all(
        self, config: ModelConfig
    ) -> Iterator[tuple[str, tuple[str, int | None, int | None], Dims]]:
        """(canonical name, (role, layer, expert), dimensions) of every canonical tensor."""
        for role, layer, dims in non_expert_dims(config.shape):
            yield self.tensor_name(config, role, layer), (role, layer, None), dims
        for layer in config.shape.sparse_layers:
            for expert in range(config.experts.num_experts):
                for role, dims in config.experts.projections:
                    name = self.tensor_name(config, role, layer, expert)
                    yield name, (role, layer, expert), dims

    def attention_tensors(self, config: ModelConfig) -> frozenset[str]:
        """Canonical names of the attention's own tensors."""
        roles = {*ATTENTION, *CROSS_ATTENTION, "position_bias"}
        return frozenset(
            self.tensor_name(config, role, layer)
            for role, layer, _ in non_expert_dims(config.shape)
            if role in roles
        )

    def saved(self, config: ModelConfig) -> dict[str, list[tuple[str, Region]]]:
        """What an export holds: tensor of a file -> (canonical name, its place there) of its
        parts."""
        tied = set(self.tied_tables(config)[1:])
        found: dict[str, list[tuple[str, Region]]] = {}
        for name, at, dims in self._all(config):
            if name not in tied:
                region = self.region(config, *at, dims, self.saved_layout)
                found.setdefault(region.file_tensor, []).append((name, region))
        return found

    def places(self, config: ModelConfig) -> dict[str, list[tuple[str, Region]]]:
        """Tensor of a file, in each layout -> (canonical name, its place there) of its parts.

        Modules of a model in memory have these names too, in one version of transformers or
        another.
        """
        found: dict[str, list[tuple[str, Region]]] = {}
        for name, at, dims in self._all(config):
            for layout in range(self.num_layouts):
                region = self.region(config, *at, dims, layout)
                parts = found.setdefault(region.file_tensor, [])
                if (name, region) not in parts[-1:]:
                    parts.append((name, region))
        return found

    def locate(
        self, config: ModelConfig, file_shapes: Mapping[str, Dims], where: str
    ) -> dict[str, Region]:
        """Find every canonical tensor among the tensors of the files.

        file_shapes: names and dimensions as on disk, in any layout of the family.
        Raises CheckpointError that names a tensor which is missing, superfluous or of other
        dimensions.
        """
        alike = self.alike_tables(config)
        # The checkpoint's reader has compared tied tables and found them equal.
        used = set(self.tied_tables(config))
        regions: dict[str, Region] = {}
        for name, at, dims in self._all(config):
            places = [self.region(config, *at, dims, n) for n in range(self.num_layouts)]
            if name in alike:
                places += [Region(other, dims, whole=dims) for other in alike]
            region = next((r for r in places if r.file_tensor in file_shapes), None)
            if region is None:
                raise CheckpointError(
                    f"{where}: tensor {name} is missing; the checkpoint is incomplete or "
                    "config.json is another model's"
                )
            found = tuple(file_shapes[region.file_tensor])
            if found != region.whole:
                raise CheckpointError(
                    f"{where}: tensor {region.file_tensor} is {list(found)}, config.json implies "
                    f"{list(region.whole)}; does config.json belong to this checkpoint?"
                )
            regions[name] = region
            used.add(region.file_tensor)
        unused = sorted(n for n in file_shapes if n not in used and not self.ignored.search(n))
        if unused:
            raise CheckpointError(
                f"{where}: {len(unused)} tensors that a {self.title} of this config does not have, "
                f"first {unused[0]!r}; does config.json belong to this checkpoint?"
            )
        return regions
