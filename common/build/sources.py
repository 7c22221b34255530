"""A tenant on its way into a store: from a checkpoint, or from the store itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.build.check_text import decide_generation
from common.checkpoints import (
    Checkpoint,
    TensorRef,
    TensorSource,
    is_adapter,
    open_checkpoint,
)
from common.checkpoints.generation_config import GenerationConfig
from common.checkpoints.peft_tensors import AdaptedTensor
from common.dtypes import BY_NAME, common_dtype, is_lossless
from common.errors import CheckpointError, StoreError
from common.families import Family, ModelConfig
from common.plan.adapted import AdaptedExpert
from common.store.assets import asset_damage
from common.store.kinds import kind_of_adapter
from common.store.objects import Objects, content_id
from common.store.store import Store

logger = logging.getLogger(__name__)

HALVES = "--dtype bfloat16 takes half the memory, and rounds"

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass
class Source:
    """A tenant on its way into a store; `ids` holds what is stored already.

    notes: of a tenant that was stored before, all that was said of it; read_notes: what its
        checkpoint's reader says.
    base_ids: of tensors that an adapter adds to, what is stored of the base's. adapted: experts of
        which that is known.
    """

    name: str
    origin: str
    family: Family
    config: ModelConfig
    refs: Mapping[str, TensorSource]
    assets: Mapping[str, Path | bytes]
    ids: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    read_notes: tuple[str, ...] = ()
    generation: GenerationConfig | None = None
    base_ids: dict[str, str] = field(default_factory=dict)
    adapted: tuple[AdaptedExpert, ...] = ()

    @classmethod
    def from_checkpoint(cls, name: str, checkpoint: Checkpoint) -> Source:
        """Raises CheckpointError for files that serving could not use."""
        generation = decide_generation(name, checkpoint)
        notes = [*checkpoint.notes, *generation.notes()]
        if checkpoint.base is not None:
            notes.insert(0, f"an adapter of {checkpoint.base.path}: {kind_of_adapter(checkpoint)}")
        return cls(
            name,
            str(checkpoint.path.resolve()),
            checkpoint.family,
            checkpoint.config,
            checkpoint.tensors,
            checkpoint.assets,
            read_notes=tuple(notes),
            generation=generation,
        )

    @classmethod
    def from_store(cls, store: Store, name: str) -> Source:
        tenant = store.tenant(name)
        if len(tenant.tensors) < len(store.family.all_shapes(tenant.config)):
            raise StoreError(
                f"{store.path}: keeps only what serving needs, so it cannot be planned anew or "
                "take other tenants; change the store that it was packed from, or build it from "
                "its checkpoints with --own-experts copy"
            )
        refs: dict[str, TensorSource] = {
            tensor: store.ref(name, tensor) for tensor in tenant.tensors
        }
        assets: dict[str, Path | bytes] = {}
        for file, entry in tenant.assets.items():
            # They are copied and hashed anew: damage would become what the store says is right.
            assets[file] = asset = store.assets_dir(name) / file
            what = asset_damage(asset, entry["sha256"])
            if what is not None:
                raise StoreError(
                    f"{asset}: {what}; restore it from a backup or build the store again"
                )
        return cls(
            name,
            tenant.source,
            store.family,
            tenant.config,
            refs,
            assets,
            dict(tenant.tensors),
            tenant.notes,
            generation=tenant.generation,
            adapted=tenant.adapted,
        )


def open_tenants(
    tenants: Sequence[tuple[str, str | Path]],
    configs: Mapping[str, str | Path],
    bases: Mapping[str, str | Path],
) -> list[Source]:
    """The tenants of a build, in order. A base that several adapters have is opened once.

    configs, bases: by tenant, see `open_checkpoint`. Raises CheckpointError.
    """
    opened: dict[Path, Checkpoint] = {}
    found: dict[str, Checkpoint] = {}
    # Whole models first: they may be the bases of adapters that were named before them.
    for name, place in sorted(tenants, key=lambda pair: is_adapter(Path(pair[1]))):
        checkpoint = open_checkpoint(place, configs.get(name), base=bases.get(name), beside=opened)
        found[name] = checkpoint
        whole = checkpoint if checkpoint.base is None else checkpoint.base
        opened.setdefault(whole.path.resolve(), whole)
    return [Source.from_checkpoint(name, found[name]) for name, _ in tenants]


def with_tenant(
    name: str, checkpoint: str | Path, config: str | Path | None, base: str | Path | None = None
) -> Callable[[Store], list[Source]]:
    """What makes the sources of a store's tenants and, last, a new one's. Raises StoreError for a
    name that is not allowed, and when it is called CheckpointError or StoreError."""
    check_name(name)

    def with_it(store: Store) -> list[Source]:
        if name in store.tenants:
            raise StoreError(
                f"tenant {name!r} is in this store already; remove it first or choose another name"
            )
        sources = [Source.from_store(store, tenant) for tenant in store.tenants]
        opened = open_checkpoint(checkpoint, config, base=base)
        sources.append(Source.from_checkpoint(name, opened))
        if opened.base is not None:
            _take_from_store(store, sources[-1], opened.base)
        check_agreement(sources)
        return sources

    return with_it


def _take_from_store(store: Store, source: Source, base: Checkpoint) -> None:
    """Give a new tenant the ids of tensors that it has from `base`, if that came into the store
    from the same directory and has not changed since.

    Whether it has is told by all non-expert tensors and one expert of each layer; others are not
    read. Raises CheckpointError.
    """
    place = str(base.path.resolve())
    tenant = next((t for t in store.manifest.tenants if t.source == place), None)
    if tenant is None or tenant.config.raw != base.config.raw:
        return
    same = [n for n, ref in source.refs.items() if ref is base.tensors.get(n)]
    family, spec = base.family, base.config.experts
    seen = set(family.non_expert_shapes(base.config))
    for layer in range(spec.num_layers):
        expert = layer % spec.num_experts
        seen |= {family.expert_tensor(base.config, layer, expert, p) for p, _ in spec.projections}
    for name in same:
        if name in seen:
            array = Reader(store.objects, store.dtype).read(source, name)
            if content_id(array) != tenant.tensors[name]:
                return
    source.refs = dict(source.refs) | {name: store.ref(tenant.name, name) for name in same}
    source.ids |= {name: tenant.tensors[name] for name in same}


def check_name(name: str) -> None:
    if not isinstance(name, str) or not TENANT_NAME.fullmatch(name):
        raise StoreError(
            f"tenant name {name!r} is not allowed; use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )


def check_tenants(names: Sequence[str], given: Mapping[str, Iterable[str]]) -> None:
    """Raises StoreError for no tenants, a name that is not allowed or given twice, and for
    something that is given for none of them. given: what it is -> tenants."""
    if not names:
        raise StoreError("a store needs at least one tenant; give --tenant NAME=CHECKPOINT")
    for name in names:
        check_name(name)
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise StoreError(f"tenant name {repeated[0]!r} is given twice; each tenant needs its own")
    for what, tenants in given.items():
        strangers = sorted(set(tenants) - set(names))
        if strangers:
            raise StoreError(
                f"{what} is given for {strangers[0]!r}, which is no tenant of this build"
            )


def check_agreement(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        differences = first.config.experts.differences(other.config.experts)
        if differences:
            raise StoreError(
                f"tenants {first.name!r} and {other.name!r} cannot share experts "
                f"({'; '.join(differences)}); "
                "tenants of one store must be fine-tunes of one architecture"
            )


def narrowest_type(sources: Sequence[Source]) -> str:
    """The store's type where none is asked for: that of all tensors if they agree, else float32;
    then tenants of a smaller type get a note."""
    types = sorted({ref.dtype for s in sources for ref in s.refs.values()})
    dtype = common_dtype(types)
    if len(types) > 1:
        listed = f"{', '.join(types[:-1])} and {types[-1]}"
        for source in sources:
            if any(ref.dtype != dtype for ref in source.refs.values()):
                note = f"the store is {dtype}, which holds {listed} without rounding; {HALVES}"
                source.read_notes = (*source.read_notes, note)
    return dtype


class Reader:
    """Tensors of several tenants in the store's type. What tenants have from one place is read
    once; made for tensors that are looked at together, and dropped with them."""

    def __init__(self, objects: Objects, dtype: str):
        self._objects, self._dtype = objects, dtype
        self._raw: dict[TensorRef, np.ndarray] = {}

    def read(self, source: Source, tensor: str) -> np.ndarray:
        """What is stored already is compared with its checksum, as new tensors are hashed: else
        distances of damaged weights would be kept, and plans made by them. Hashing (1.8 GB/s a
        thread) costs less than most disks' reading."""
        ref = source.refs[tensor]
        if tensor in source.ids and isinstance(ref, TensorRef):
            return self._objects.read(ref)
        if isinstance(ref, AdaptedTensor):  # in float32, so that it is rounded once
            start = self._of_file(ref.start) if isinstance(ref.start, TensorRef) else None
            return self._converted(ref.merged(start))
        return self._converted(self._of_file(ref) if isinstance(ref, TensorRef) else ref.read())

    def base(self, ref: AdaptedTensor) -> np.ndarray:
        """What an adapter adds to, in the store's type."""
        start = ref.start
        return self._converted(
            self._of_file(start) if isinstance(start, TensorRef) else start.read()
        )

    def _of_file(self, ref: TensorRef) -> np.ndarray:
        if ref not in self._raw:
            self._raw[ref] = ref.read()
        return self._raw[ref]

    def _converted(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == BY_NAME[self._dtype]:
            return array
        with np.errstate(
            over="ignore"
        ):  # what does not fit becomes infinite and is refused by name
            return array.astype(BY_NAME[self._dtype])


def first_of_equal(sources: Sequence[Source], tensor: str) -> list[int]:
    """For each source the number of the first one that has the tensor from the same place."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(place_of(s.refs[tensor]), i) for i, s in enumerate(sources)]


def place_of(ref: TensorSource) -> Hashable:
    """Equal for tensors that are the same bytes of the same file."""
    return ref if isinstance(ref, TensorRef | AdaptedTensor) else id(ref)


def refuse_not_finite(source: Source, tensor: str, dtype: str) -> None:
    ref = source.refs[tensor]
    converted = "" if ref.dtype == dtype else f" after conversion from {ref.dtype} to {dtype}"
    raise CheckpointError(
        f"{ref.path}: tensor {ref.file_tensor} of tenant {source.name!r} holds NaN or infinite "
        f"values{converted}; "
        "fix the checkpoint" + (", or build with --dtype float32" if converted else "")
    )


def notes_of(source: Source, dtype: str) -> tuple[str, ...]:
    """What was converted on the way in, so that it is said and not only done."""
    if source.notes:
        return source.notes
    counts: dict[str, int] = {}
    for ref in source.refs.values():
        if ref.dtype != dtype:
            counts[ref.dtype] = counts.get(ref.dtype, 0) + 1
    notes = list(source.read_notes)
    for found, count in sorted(counts.items()):
        loss = "without loss" if is_lossless(found, dtype) else "rounded"
        notes.append(f"{count} tensors converted from {found} to {dtype} ({loss})")
    for note in notes:
        logger.info("tenant %s: %s", source.name, note)
    return tuple(notes)
