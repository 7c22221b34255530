"""Merging: one model made of several fine-tunes of a base. The baselines that shared experts are
measured against.

    average          mean of the tenants' weights
    task_arithmetic  base + scale * sum of (tenant - base)                             (arXiv
    2212.04089) ties             differences trimmed, signs elected, mean of those that agree
    (arXiv 2306.01708) dare             differences dropped at random, the rest rescaled, then
    summed     (arXiv 2311.03099) dare_ties        differences dropped at random and rescaled, then
    as in ties       (arXiv 2311.03099)

Tensor by tensor: memory for one tensor of the base and of every tenant, in float32, and for one
shard of the result. TIES trims every tensor by itself, each matrix of an expert being one. mergekit
0.1.5 gives the same bit for bit except that it trims all experts of a layer as one tensor, as
transformers 5 holds them; the paper's own code trims over the whole model. dare_ties takes the mean
of what agrees, as the papers' authors do; mergekit's default is the sum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints import (
    Checkpoint,
    open_checkpoint,
    read_asset,
    saved_tensors,
    write_hugging_face,
)
from common.checkpoints.staging import new_directory
from common.dtypes import BY_NAME, common_dtype, to_float32
from common.errors import CheckpointError, PlanError
from common.plan.plan import MERGED, Copy, Plan
from common.progress import Progress, silent
from common.store import Store
from common.store.change import set_plan

METHODS = ("average", "task_arithmetic", "ties", "dare", "dare_ties")
NEED_BASE = METHODS[1:]

# What the papers recommend where nothing is tuned: task arithmetic 0.4 (TIES, section 5, after
# 2212.04089), TIES 1.
SCALES = {"task_arithmetic": 0.4, "ties": 1.0, "dare": 0.4, "dare_ties": 1.0}


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    scale: what the merged difference is multiplied by (lambda); None: the method's usual one, see
        `SCALES`.
    density: share of each difference's entries, the largest, that ties keeps.
    drop: probability with which dare drops an entry; what stays is divided by 1 - drop. The paper
        goes to 0.9 and beyond for differences up to 0.002; larger ones bear less.
    seed: of dare's draws, which depend on seed, tenant's number and tensor's name alone.

    Raises PlanError for an unknown method and for values out of range.
    """

    method: str
    scale: float | None = None
    density: float = 0.2
    drop: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(f"no merging method {self.method!r}; there is: {', '.join(METHODS)}")
        if self.scale is not None and not np.isfinite(self.scale):
            raise PlanError(f"scale of {self.method} is {self.scale!r}; give a number")
        if not 0 < self.density <= 1:
            raise PlanError(
                f"density of {self.method} is {self.density!r}; give a share above 0 and at most 1"
            )
        if not 0 <= self.drop < 1:
            raise PlanError(
                f"drop of {self.method} is {self.drop!r}; give a probability from 0 and below 1"
            )

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any]) -> Recipe:
        """Raises PlanError for an option that a recipe does not have."""
        known = [f.name for f in fields(cls) if f.name != "method"]
        for name in options:
            if name not in known:
                raise PlanError(f"{method} has no option {name!r}; it has: {', '.join(known)}")
        return cls(method, **options)

    @property
    def factor(self) -> float:
        """The scale in use."""
        return SCALES.get(self.method, 1.0) if self.scale is None else self.scale

    @property
    def needs_base(self) -> bool:
        return self.method in NEED_BASE


def trim(difference: np.ndarray, density: float) -> np.ndarray:
    """Zero all but the `density` share of entries (rounded down, at least one) that are largest in
    magnitude."""
    keep = max(1, int(density * difference.size))
    if keep >= difference.size:
        return difference
    flat = difference.reshape(-1)
    kept = np.argpartition(np.abs(flat), flat.size - keep)[flat.size - keep :]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(difference.shape)


def drop(difference: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Zero each entry with probability `rate`, divide the others by 1 - rate."""
    mask = rng.random(difference.shape, dtype=np.float32) >= rate
    return np.asarray(np.where(mask, difference / np.float32(1 - rate), np.float32(0)))


def elect_and_mean(differences: Sequence[np.ndarray]) -> np.ndarray:
    """TIES, steps 2 and 3: per entry the sign of the sum, and the mean of the non-zero differences
    that have it."""
    total = np.zeros_like(differences[0])
    for d in differences:
        total += d
    sign = np.where(total >= 0, np.float32(1), np.float32(-1))
    merged, count = np.zeros_like(total), np.zeros_like(total)
    for d in differences:
        agrees = d * sign > 0
        merged += np.where(agrees, d, np.float32(0))
        count += agrees
    return np.asarray(merged / np.maximum(count, 1))


def merge_arrays(
    recipe: Recipe,
    base: np.ndarray | None,
    tuned: Sequence[np.ndarray],
    name: str = "",
    tenants: Sequence[int] = (),
) -> np.ndarray:
    """One tensor of the merged model, float32.

    base: the same tensor of the base, None for `average`. tuned: each tenant's. name and tenants
    (numbers; default 0, 1, ...) choose the draws of dare.
    """
    arrays = [to_float32(a) for a in tuned]
    if recipe.method == "average":
        return np.asarray(sum(arrays[1:], arrays[0].copy()) / np.float32(len(arrays)))
    if base is None:
        raise PlanError(f"{recipe.method} needs the base that the tenants were tuned from")
    start = to_float32(base)
    differences = [a - start for a in arrays]
    if recipe.method.startswith("dare"):
        numbers = tenants or range(len(arrays))
        rngs = [np.random.default_rng([recipe.seed, t, zlib.crc32(name.encode())]) for t in numbers]
        differences = [drop(d, recipe.drop, rng) for d, rng in zip(differences, rngs, strict=True)]
    if recipe.method == "ties":
        differences = [trim(d, recipe.density) for d in differences]
    if recipe.method.endswith("ties"):
        change = elect_and_mean(differences)
    else:
        change = np.asarray(sum(differences[1:], differences[0]))
    return np.asarray(start + np.float32(recipe.factor) * change)


def merge(
    recipe: Recipe,
    tenants: Mapping[str, str | Path],
    base: str | Path | None,
    out: str | Path,
    *,
    dtype: str = "auto",
    progress: Progress = silent,
) -> None:
    """Write the merged model as a Hugging Face checkpoint, with the first tenant's config and
    tokenizer.

    dtype: of the result; auto: the tenants' own if they agree, else float32. Raises CheckpointError
    or PlanError that names tenant and tensor; `out` must not exist or be empty.
    """
    opened = {name: open_checkpoint(path) for name, path in tenants.items()}
    if not opened:
        raise PlanError("nothing to merge: give at least one tenant")
    base_opened = _open_base(recipe, base)
    for name, checkpoint in opened.items():
        _check_same(next(iter(opened)), next(iter(opened.values())), name, checkpoint)
    if base_opened is not None:
        _check_same(next(iter(opened)), next(iter(opened.values())), "the base", base_opened)
    first = next(iter(opened.values()))
    if dtype == "auto":
        dtype = common_dtype([c.dtype for c in opened.values()])
    with (
        new_directory(out) as directory,
        progress(f"merging, {recipe.method}", len(first.family.saved(first.config))) as advance,
    ):
        for asset, content in first.assets.items():
            if asset != "config.json":
                (directory / asset).write_bytes(read_asset(content))

        def merged(name: str) -> np.ndarray:
            start = None if base_opened is None else base_opened.tensors[name].read()
            each = [c.tensors[name].read() for c in opened.values()]
            return merge_arrays(recipe, start, each, name).astype(BY_NAME[dtype])

        config = first.family.hf_config(first.config, dtype)
        tensors = saved_tensors(first.family, first.config, merged)
        write_hugging_face(directory, config, tensors, on_tensor=advance)


class _MergedExperts(Mapping[int, Mapping[str, np.ndarray]]):
    """Slot -> projection -> float32 [out, in] of every position in row-major order, made when asked
    for."""

    def __init__(self, store: Store, recipe: Recipe, base: Checkpoint | None):
        self._store, self._recipe, self._base = store, recipe, base
        self._experts = store.experts.num_experts

    def __len__(self) -> int:
        return self._store.experts.num_positions

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, slot: int) -> Mapping[str, np.ndarray]:
        layer, expert = divmod(slot, self._experts)
        store = self._store
        found = {}
        for projection, _ in store.experts.projections:
            name = store.family.expert_tensor(
                store.config(store.tenants[0]), layer, expert, projection
            )
            start = None if self._base is None else self._base.tensors[name].read()
            found[projection] = merge_arrays(
                self._recipe, start, [store.ref(t, name).read() for t in store.tenants], name
            )
        return found


def merge_experts(path: str | Path, recipe: Recipe, base: str | Path | None) -> Store:
    """Replace a store's plan: one merged copy a position serves all tenants, each with its own
    non-expert weights.

    Raises PlanError, CheckpointError, StoreError; the store is then as it was.
    """
    store = Store.open(path)
    opened = _open_base(recipe, base)
    if opened is not None and (differences := store.experts.differences(opened.config.experts)):
        raise PlanError(
            f"{opened.path}: the base's experts differ from the store's ({'; '.join(differences)})"
        )
    layers, experts = store.experts.num_layers, store.experts.num_experts
    copies = tuple(
        Copy(layer, expert, MERGED) for layer in range(layers) for expert in range(experts)
    )
    serving = np.broadcast_to(
        np.arange(len(copies)).reshape(layers, experts), (len(store.tenants), layers, experts)
    )
    plan = Plan(f"{recipe.method}_experts", store.tenants, layers, experts, copies, serving)
    return set_plan(path, plan, merged=_MergedExperts(store, recipe, opened))


def _open_base(recipe: Recipe, base: str | Path | None) -> Checkpoint | None:
    if not recipe.needs_base:
        return None
    if base is None:
        raise PlanError(
            f"{recipe.method} needs the base that the tenants were tuned from; give it with --base"
        )
    return open_checkpoint(base)


def _check_same(name: str, one: Checkpoint, other_name: str, other: Checkpoint) -> None:
    """Raises CheckpointError unless both have the same tensors in the same shapes."""
    differences = one.config.experts.differences(other.config.experts)
    if differences:
        raise CheckpointError(
            f"{other.path}: {other_name} cannot be merged with {name} ({'; '.join(differences)}); "
            "merging needs fine-tunes of one base"
        )
    for tensor, ref in one.tensors.items():
        found = other.tensors.get(tensor)
        if found is None or tuple(found.shape) != tuple(ref.shape):
            what = "is missing" if found is None else f"is {list(found.shape)}"
            raise CheckpointError(
                f"{other.path}: tensor {tensor} of {other_name} {what}, {name} has "
                f"{list(ref.shape)}; one model cannot "
                "be made of both (share their experts instead: `moetel build`)"
            )
