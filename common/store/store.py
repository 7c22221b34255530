"""An open store, read-only: tenants, plan, distances, and every tensor by reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints import TensorRef, saved_tensors, write_hugging_face
from common.checkpoints.generation_config import FILE as GENERATION_FILE
from common.checkpoints.generation_config import GenerationConfig, decide
from common.checkpoints.staging import new_directory
from common.dtypes import BY_NAME, to_float32
from common.errors import CheckpointError, StoreError, UnknownTenantError
from common.families import ExpertSpec, Family, ModelConfig
from common.plan.distance import Distances, tenant_pairs
from common.plan.plan import MERGED, MISS, Plan
from common.plan.residual import matrices
from common.progress import Progress, silent
from common.store.assets import asset_damage
from common.store.manifest import FILE, Manifest, Tenant
from common.store.objects import Objects


@dataclass(frozen=True)
class Problem:
    """A file of the store that is not as it was written. object_ids: what is damaged in it."""

    file: Path
    what: str
    object_ids: tuple[str, ...] = ()


class Store:
    """A store on disk, to be opened with `Store.open(path)`.

    Nothing is loaded until asked for. Tensors come memory-mapped, or as references.
    """

    def __init__(self, path: Path, manifest: Manifest, objects: Objects | None = None):
        """objects: of a store that is being written, whose manifest does not name them yet."""
        self.path = path
        self.manifest = manifest
        self.objects = objects or Objects(path / "objects", manifest.objects)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store. Raises StoreError for none, or a damaged manifest; see also `verify`."""
        path = Path(path)
        return cls(path, Manifest.read(path))

    def with_plan(self, plan: Plan) -> Store:
        """The same files with another plan, of tenants' own copies alone. Nothing is written."""
        manifest = replace(self.manifest, plan=plan, merged={}, residuals=())
        return Store(self.path, manifest, self.objects)

    @property
    def family(self) -> Family:
        return self.manifest.family

    @property
    def dtype(self) -> str:
        """float32, float16 or bfloat16: the type of every weight in the store."""
        return self.manifest.dtype

    @property
    def plan(self) -> Plan:
        """Which copies are resident, and which of them serves whom."""
        return self.manifest.plan

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names, in the order that plans count them."""
        return tuple(t.name for t in self.manifest.tenants)

    @property
    def experts(self) -> ExpertSpec:
        return self.manifest.tenants[0].config.experts

    def tenant(self, name: str) -> Tenant:
        """What the manifest says of a tenant. Raises UnknownTenantError."""
        for tenant in self.manifest.tenants:
            if tenant.name == name:
                return tenant
        raise UnknownTenantError(name, self.tenants)

    def config(self, name: str) -> ModelConfig:
        return self.tenant(name).config

    def generation(self, name: str) -> GenerationConfig:
        """What was decided at the build about a tenant's special tokens and sampling.

        Raises CheckpointError for a store that holds no decision, and whose files do not allow one.
        """
        tenant = self.tenant(name)
        if tenant.generation is not None:
            return tenant.generation
        path = self.assets_dir(name) / GENERATION_FILE
        return decide(
            tenant.config,
            path if path.is_file() else None,
            default_eos=self.family.default_eos_token_id,
            where=f"{FILE}: config of tenant {name!r}",
        )

    def assets_dir(self, name: str) -> Path:
        """The folder with the tenant's tokenizer files, generation config and chat template."""
        return self.path / "assets" / self.tenant(name).assets_folder

    def ref(self, name: str, tensor: str) -> TensorRef:
        """Where a tenant's tensor lies, by its canonical name."""
        found = self.tenant(name)
        object_id = found.tensors.get(tensor)
        if object_id is None:
            raise StoreError(
                f"{self.path}: holds no {tensor} of tenant {name!r}, as it keeps only what serving "
                "needs; use the store that it was packed from, or build it with "
                "--own-experts copy"
            )
        return self.objects.ref(object_id)

    def departed(self, later: Store) -> set[str]:
        """Tenants that a later state of this store lacks, or has with other weights or files."""
        return {
            t.name
            for t in self.manifest.tenants
            if t.name not in later.tenants
            or later.tenant(t.name).tensors != t.tensors
            or later.tenant(t.name).assets_folder != t.assets_folder
        }

    def role_tensor(self, name: str, role: str, layer: int | None = None) -> str:
        """Canonical name of a tenant's tensor with a role; see `common.families.shape`."""
        return self.family.tensor_name(self.config(name), role, layer)

    def copy_refs(self, name: str, layer: int, expert: int) -> dict[str, TensorRef]:
        """A tenant's own expert at a position: projection -> reference."""
        config = self.config(name)
        return {
            projection: self.ref(name, self.family.expert_tensor(config, layer, expert, projection))
            for projection, _ in config.experts.projections
        }

    def own_expert(self, name: str, layer: int, expert: int) -> dict[str, np.ndarray]:
        """A tenant's own expert at a position: projection -> float32 [out, in].

        Its files are compared with their checksums. Raises StoreError that names a damaged one.
        """
        refs = self.copy_refs(name, layer, expert)
        return {projection: to_float32(self.objects.read(ref)) for projection, ref in refs.items()}

    def own_content(self, name: str, layer: int, expert: int) -> tuple[str, ...]:
        """Equal for own experts of the same weights, in this store and any other."""
        return tuple(ref.file_tensor for ref in self.copy_refs(name, layer, expert).values())

    def hold_misses(self) -> None:
        """Map the files of all experts that can be missed, so that a damaged store is found before
        the first request, and a replaced one does no harm. Raises StoreError."""
        names = self.tenants
        self.objects.hold(
            object_id
            for tenant, layer, expert in np.argwhere(self.plan.serving == MISS).tolist()
            for object_id in self.own_content(names[tenant], layer, expert)
        )

    def slot_refs(self, slot: int) -> dict[str, TensorRef]:
        """The weights of a resident copy, its owner's or merged ones: projection -> reference."""
        copy = self.plan.copies[slot]
        if copy.owner != MERGED:
            return self.copy_refs(self.tenants[copy.owner], copy.layer, copy.expert)
        ids = self.manifest.merged[slot]
        return {name: self.objects.ref(ids[name]) for name, _ in self.experts.projections}

    def slot_content(self, slot: int) -> tuple[str, ...]:
        """Equal for resident copies whose weights are the same, in this store and any other."""
        return tuple(ref.file_tensor for ref in self.slot_refs(slot).values())

    def tenant_content(self, name: str) -> tuple[str, ...]:
        """Equal for tenants with the same non-expert weights and config, in any store."""
        tenant = self.tenant(name)
        ids = [tenant.tensors[t] for t in self.family.non_expert_shapes(tenant.config)]
        return (repr(tenant.config), *ids)

    def residual_ref(self, index: int) -> TensorRef:
        """The record of `plan.residuals[index]`: uint8 [bytes], as docs/store-format.md says."""
        return self.objects.ref(self.manifest.residuals[index])

    def served_expert(self, name: str, layer: int, expert: int) -> dict[str, np.ndarray]:
        """The weights, residual included, that answer: projection -> float32 [out, in]."""
        index = self.tenants.index(self.tenant(name).name)
        slot = int(self.plan.serving[index, layer, expert])
        refs = self.copy_refs(name, layer, expert) if slot == MISS else self.slot_refs(slot)
        found = {p: to_float32(self.objects.read(ref)) for p, ref in refs.items()}
        number = self.plan.residual_of(index, layer, expert)
        if number is not None:
            record = self.residual_ref(number).read()
            parts = matrices(self.plan.residuals[number], record, dict(self.experts.projections))
            for projection, matrix in parts.items():
                found[projection] = found[projection] + matrix
        return found

    @cached_property
    def distances(self) -> Distances:
        """The full matrices measured at build. Raises StoreError where their file is damaged."""
        entry = self.manifest.similarity
        shape = (
            len(tenant_pairs(len(self.tenants))),
            self.experts.num_layers,
            self.experts.num_experts,
        )
        if not shape[0]:
            return Distances(self.tenants, np.zeros(shape))
        found = self.objects.read(self.objects.ref(entry["object"]))
        return Distances(self.tenants, found.astype(np.float64))

    # Memory, in bytes of the store's type.

    @property
    def copy_bytes(self) -> int:
        """One copy of one position."""
        return self.experts.copy_elements * BY_NAME[self.dtype].itemsize

    def non_expert_bytes(self, name: str) -> int:
        return non_expert_bytes(self.family, self.config(name), self.dtype)

    @property
    def residual_bytes(self) -> int:
        """All tenants' residuals."""
        shapes = dict(self.experts.projections)
        return sum(r.nbytes(shapes) for r in self.plan.residuals)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the pool and all residuals beyond one model's experts; may be negative."""
        return (
            self.plan.num_slots * self.copy_bytes
            + self.residual_bytes
            - self.experts.num_positions * self.copy_bytes
        )

    @property
    def bytes_before(self) -> int:
        """What the tenants take as separate models."""
        experts = len(self.tenants) * self.experts.num_positions * self.copy_bytes
        return experts + sum(self.non_expert_bytes(name) for name in self.tenants)

    @property
    def bytes_after(self) -> int:
        """What the pool, all residuals and all tenants' non-expert weights take together."""
        return (
            self.plan.num_slots * self.copy_bytes
            + self.residual_bytes
            + sum(self.non_expert_bytes(name) for name in self.tenants)
        )

    @property
    def bytes_budget(self) -> int:
        """What `--budget` counts: pool, residuals, and the largest tenant's other weights."""
        largest = max(self.non_expert_bytes(name) for name in self.tenants)
        return self.plan.num_slots * self.copy_bytes + self.residual_bytes + largest

    def verify(self, on_object: Callable[[], None] | None = None) -> list[Problem]:
        """Compare every file with its checksum. Returns the damaged or missing ones."""
        damaged: dict[tuple[Path, str], list[str]] = {}
        files: dict[Path, str | None] = {}
        places = self.manifest.objects
        for object_id in sorted(places, key=lambda i: (places[i].shard, places[i].offset)):
            path = self.objects.path(object_id)
            if path not in files:
                files[path] = self.objects.shard_damage(object_id)
            what = files[path] or self.objects.damage(object_id)
            if what is not None:
                damaged.setdefault((path, what), []).append(object_id)
            if on_object:
                on_object()
        problems = [Problem(*place, tuple(ids)) for place, ids in damaged.items()]
        # Tenants with equal files share a folder, whose files are checked once.
        checksums = {
            self.assets_dir(tenant.name) / name: entry["sha256"]
            for tenant in self.manifest.tenants
            for name, entry in tenant.assets.items()
        }
        for path, checksum in checksums.items():
            what = asset_damage(path, checksum)
            if what is not None:
                problems.append(Problem(path, what))
        return problems

    def owners_of(self, object_ids: Collection[str]) -> list[str]:
        """`tenant: tensor` for everything that objects hold, to name what a damaged file costs."""
        return [
            f"{t.name}: {tensor}"
            for t in self.manifest.tenants
            for tensor, i in t.tensors.items()
            if i in object_ids
        ]

    def export(self, name: str, target: str | Path, progress: Progress = silent) -> None:
        """Write a tenant, as the store serves it, as a plain Hugging Face checkpoint.

        Each expert is the copy that the plan gives the tenant (its own where it misses), with the
        tenant's residual added and rounded to the store's type. The directory must be absent or
        empty. Raises StoreError.
        """
        tenant = self.tenant(name)
        places = {
            tensor: (layer, expert, projection)
            for layer, expert, projection, tensor in self.family.iter_expert_tensors(tenant.config)
        }

        def read(tensor: str) -> np.ndarray:
            place = places.get(tensor)
            if place is None:
                return self.ref(name, tensor).map()
            return self._served_matrix(name, *place)

        try:
            with new_directory(target, name) as partial:
                for asset in tenant.assets:
                    if asset not in ("config.json", GENERATION_FILE):
                        (partial / asset).write_bytes((self.assets_dir(name) / asset).read_bytes())
                config = self.family.hf_config(tenant.config, self.dtype)
                self._write_generation(name, partial)
                saved = self.family.saved(tenant.config)
                with progress(f"exporting {name}", len(saved)) as advance:
                    tensors = saved_tensors(self.family, tenant.config, read)
                    write_hugging_face(partial, config, tensors, on_tensor=advance)
        except CheckpointError as error:
            raise StoreError(str(error)) from error

    def _write_generation(self, name: str, target: Path) -> None:
        """generation_config.json of an export: the checkpoint's own with the special tokens that
        were decided."""
        path = self.assets_dir(name) / GENERATION_FILE
        given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = given | self.generation(name).token_ids
        if found:
            (target / GENERATION_FILE).write_text(
                json.dumps(found, indent=2) + "\n", encoding="utf-8"
            )

    def _served_matrix(self, name: str, layer: int, expert: int, projection: str) -> np.ndarray:
        """One matrix of `served_expert`, in the store's type."""
        index = self.tenants.index(name)
        slot = int(self.plan.serving[index, layer, expert])
        if self.plan.residual_of(index, layer, expert) is None:
            refs = self.copy_refs(name, layer, expert) if slot == MISS else self.slot_refs(slot)
            return self.objects.map(refs[projection])
        return self.served_expert(name, layer, expert)[projection].astype(BY_NAME[self.dtype])

    def describe(self) -> dict[str, Any]:
        """Sizes in bytes and counts, for tables."""
        return {
            "tenants": list(self.tenants),
            "family": self.family.name,
            "dtype": self.dtype,
            "positions": self.experts.num_positions,
            "resident_copies": self.plan.num_slots,
            "missing": self.plan.num_misses,
            "merged_copies": len(self.manifest.merged),
            "residuals": len(self.plan.residuals),
            "residual_bytes": self.residual_bytes,
            "extra_bytes": self.extra_bytes,
            "copy_bytes": self.copy_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_budget": self.bytes_budget,
            "bytes_on_disk": sum(e.nbytes for e in self.manifest.objects.values() if e.in_store),
        }


def is_store(path: Path) -> bool:
    return (path / FILE).is_file()


def non_expert_bytes(family: Family, config: ModelConfig, dtype: str) -> int:
    """Bytes of one tenant's non-expert weights; a tied head counts once."""
    total = 0
    tied = family.tied_tables(config)[1:]
    for name, shape in family.non_expert_shapes(config).items():
        if name in tied:
            continue
        total += int(np.prod(shape, dtype=np.int64))
    return total * BY_NAME[dtype].itemsize
