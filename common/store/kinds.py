"""What kind of fine-tune each tenant is, beside another tenant of its store.

Which tensors are equal is told by the manifest alone, nothing is read for it. The rank of what
moved is measured on a
sample: a few experts, and of large matrices some rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from common.checkpoints import Checkpoint, TensorSource
from common.checkpoints.peft_tensors import AdaptedTensor, LowRank
from common.dtypes import to_float32
from common.errors import CheckpointError, StoreError
from common.store.store import Store

# Experts whose differences are measured, spread over all that moved.
SAMPLED_EXPERTS = 4
# Rows of a matrix that are read. A difference of rank r has rank r in these, if r is well below
# their number.
SAMPLED_ROWS = 256
# A difference counts as of low rank up to this share of the largest that its sample can have.
LOW = 0.5

# Bits of the stored mantissa of each type.
_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7}


@dataclass(frozen=True)
class Kind:
    """How a tenant differs from a reference.

    moved, positions: experts that differ, of how many. non_experts: differing non-expert tensors;
    attention_only: all of them attention's. rank: of all differences measured, at most; None for
        more than low rank, or not measured.
    measured: experts that the rank was measured on; 0 where an adapter says it of all.
    """

    moved: int
    positions: int
    non_experts: int
    attention_only: bool
    rank: int | None = None
    measured: int = 0

    def __str__(self) -> str:
        if not self.moved:
            if not self.non_experts:
                return "identical"
            return "attention only" if self.attention_only else "non-expert weights only"
        experts = f"{self.moved} of {self.positions} experts moved"
        if self.rank is not None:
            found = f"low rank {self.rank}" if self.rank else "rounding alone"
            return f"{found}, {experts}" + (
                f" (measured on {self.measured})" if self.measured else ""
            )
        return "full" if self.moved == self.positions else experts


def reference_of(store: Store) -> str:
    """The tenant that others are compared with: `base` if there is one, else the first."""
    return "base" if "base" in store.tenants else store.tenants[0]


def kind_of(store: Store, name: str, reference: str) -> Kind:
    """Compare two tenants. Reads at most `SAMPLED_ROWS` rows of the matrices of `SAMPLED_EXPERTS`
    experts, and nothing where an adapter of the reference tells the rank.

    Raises UnknownTenantError.
    """
    mine, base = store.tenant(name), store.tenant(reference)
    spec, family = store.experts, store.family
    moved = [
        (layer, expert)
        for layer in range(spec.num_layers)
        for expert in range(spec.num_experts)
        if any(
            mine.tensors[family.expert_tensor(mine.config, layer, expert, p)]
            != base.tensors[family.expert_tensor(base.config, layer, expert, p)]
            for p, _ in spec.projections
        )
    ]
    names = {**family.non_expert_shapes(mine.config), **family.non_expert_shapes(base.config)}
    others = [n for n in names if mine.tensors.get(n) != base.tensors.get(n)]
    attention_only = family.attention_tensors(mine.config).issuperset(others)
    found = Kind(len(moved), spec.num_positions, len(others), attention_only)
    told = _told_rank(store, name, reference, moved)
    if told is not None:
        return replace(found, rank=told)
    chosen = (
        [moved[i] for i in np.unique(np.linspace(0, len(moved) - 1, SAMPLED_EXPERTS).astype(int))]
        if moved
        else []
    )
    largest = 0
    for layer, expert in chosen:
        for projection, _ in spec.projections:
            try:
                rank = _rank(store, name, reference, layer, expert, projection)
            except (CheckpointError, StoreError):  # damage is for `moetel verify` to name
                return found
            if rank is None:
                return found
            largest = max(largest, rank)
    return (
        Kind(len(moved), spec.num_positions, len(others), attention_only, largest, len(chosen))
        if chosen
        else found
    )


def kind_of_adapter(checkpoint: Checkpoint) -> str:
    """What an adapter does to its base, by what it says itself: a kind and its ranks."""
    family, config = checkpoint.family, checkpoint.config
    spec, base = config.experts, checkpoint.base
    assert base is not None
    changed = {n: ref for n, ref in checkpoint.tensors.items() if ref is not base.tensors.get(n)}
    experts: dict[tuple[int, int], list[str]] = {}
    for layer, expert, _, name in family.iter_expert_tensors(config):
        if name in changed:
            experts.setdefault((layer, expert), []).append(name)
    others = set(changed) - {name for names in experts.values() for name in names}
    low_rank = {name: _ranks(ref) for name, ref in changed.items()}
    of_experts = [low_rank[name] for names in experts.values() for name in names]
    rank = max((sum(r) for r in of_experts), default=None) if all(of_experts) else None
    attention_only = family.attention_tensors(config).issuperset(others)
    found = Kind(len(experts), spec.num_positions, len(others), attention_only, rank)
    ranks = sorted({r for each in low_rank.values() for r in each})
    if not ranks:
        return str(found)
    between = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{found} (LoRA of rank {between})"


def _ranks(ref: TensorSource) -> list[int]:
    """Of the terms that are added to a tensor; none if it is replaced."""
    if not isinstance(ref, AdaptedTensor) or ref.replaced:
        return []
    return [term.rank for term in ref.terms if isinstance(term, LowRank)]


def _told_rank(store: Store, name: str, reference: str, moved: list[tuple[int, int]]) -> int | None:
    """The largest rank of an adapter that made all experts that moved of the reference's."""
    told = {(a.layer, a.expert): a for a in store.tenant(name).adapted}
    base, spec, family = store.tenant(reference), store.experts, store.family
    largest = 0
    for place in moved:
        names = {p: family.expert_tensor(base.config, *place, p) for p, _ in spec.projections}
        adapted = told.get(place)
        if adapted is None or any(adapted.base[p] != base.tensors[n] for p, n in names.items()):
            return None
        largest = max(largest, adapted.rank)
    return largest or None


def _rank(
    store: Store, name: str, reference: str, layer: int, expert: int, projection: str
) -> int | None:
    """Rank of one matrix's difference, as far as rounding lets it be seen; None if it is more than
    low."""
    mine = store.copy_refs(name, layer, expert)[projection].map()
    base = store.copy_refs(reference, layer, expert)[projection].map()
    rows = np.unique(np.linspace(0, len(mine) - 1, SAMPLED_ROWS).astype(int))
    a, b = (to_float32(np.ascontiguousarray(m[rows])) for m in (mine, base))
    difference = a.astype(np.float64) - b
    # Singular values by the smaller side's products, largest first.
    square = (
        difference @ difference.T if len(rows) <= difference.shape[1] else difference.T @ difference
    )
    energies = np.clip(np.linalg.eigvalsh(square)[::-1], 0, None)
    left = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    # What a sum of base and correction loses when it is rounded to the tenant's type, twice to be
    # sure.
    noise = 2 * _rounding_energy(a, store.dtype) + 1e-12 * left[0]
    rank = int(np.argmax(left <= noise))
    return rank if rank <= LOW * len(energies) else None


def _rounding_energy(values: np.ndarray, dtype: str) -> float:
    """Expected sum of squared errors of rounding to the type of `values`: a twelfth of the squared
    spacing each."""
    bits = _MANTISSA[dtype]
    if dtype == "float32" and not (values.view(np.uint32) & 0xFFFF).any():
        bits = _MANTISSA["bfloat16"]  # widened for another tenant's sake
    _, exponents = np.frexp(values)
    return float(np.sum(np.exp2(2.0 * (exponents - 1 - bits)), where=values != 0) / 12)
