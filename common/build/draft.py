"""One pass over every tensor: check, convert, compare, hash and write it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.build.adapted import adapted_experts
from common.build.sources import (
    Reader,
    Source,
    first_of_equal,
    notes_of,
    place_of,
    refuse_not_finite,
)
from common.checkpoints import TensorRef, TensorSource
from common.checkpoints.peft_tensors import AdaptedTensor
from common.plan.distance import Distances, compare, tenant_pairs
from common.plan.plan import plan_all
from common.progress import Progress
from common.store.assets import save_assets
from common.store.manifest import COPY, Manifest, Tenant
from common.store.objects import Objects
from common.store.store import Store

# Bytes of tensors that the threads of a build hold at once; one thread may exceed it with its one
# tensor of every tenant.
IN_FLIGHT_BYTES = 1 << 30


def make_draft(
    directory: Path,
    sources: Sequence[Source],
    dtype: str,
    old: Distances | None,
    provenance: Mapping[str, Any],
    progress: Progress,
    objects: Objects,
    own_experts: str = COPY,
) -> Store:
    """Put every tensor of every source into `directory`: a store, not yet committed, that shares
    what is identical.

    old: distances of tenants that need not be measured again. objects: of `directory`, with what is
        there already. own_experts: one of `OWN_EXPERTS`.
    """
    matrix = _store_experts(objects, sources, dtype, old, progress, own_experts != COPY)
    _store_non_experts(objects, sources, dtype, progress)
    for source in sources:
        if source.base_ids:
            source.adapted = adapted_experts(source, dtype, objects.put)
    names = tuple(s.name for s in sources)
    # The plan follows from what is kept (float32), so that planning again from the store gives the
    # same plan.
    distances = Distances(names, matrix.astype(np.float32).astype(np.float64))
    similarity: dict[str, Any] = {"object": None, "layers": distances.layer_summary()}
    if distances.matrix.shape[0]:
        similarity["object"] = objects.put(distances.matrix.astype(np.float32))
    tenants = []
    for source in sources:
        folder, files = save_assets(directory / "assets", source.assets)
        tenants.append(
            Tenant(
                source.name,
                source.origin,
                source.config,
                source.ids,
                folder,
                files,
                notes_of(source, dtype),
                source.generation,
                source.adapted,
            )
        )
    # What is planned and measured from here on looks at the tensors through a store that shares
    # nothing.
    everything = plan_all(_contents(sources), distances.tenants)
    manifest = Manifest(
        sources[0].family,
        dtype,
        tuple(tenants),
        everything,
        {},
        similarity,
        provenance,
        own_experts=own_experts,
    )
    return Store(directory, manifest, objects)


def _store_experts(
    objects: Objects,
    sources: Sequence[Source],
    dtype: str,
    old: Distances | None,
    progress: Progress,
    refer: bool,
) -> np.ndarray:
    """Store all expert tensors and measure distances. Returns float64 [pairs, layers, experts].

    refer: leave those in their checkpoints that lie there as they are needed.
    """
    family, config = sources[0].family, sources[0].config
    spec = config.experts
    pairs = tenant_pairs(len(sources))
    matrix = np.zeros((len(pairs), spec.num_layers, spec.num_experts), dtype=np.float64)
    new_pairs = []
    for i, (a, b) in enumerate(pairs):
        if old is not None and sources[a].name in old.tenants and sources[b].name in old.tenants:
            matrix[i] = old.matrix[
                old.pairs.index(
                    (old.tenants.index(sources[a].name), old.tenants.index(sources[b].name))
                )
            ]
        else:
            new_pairs.append(i)
    if not new_pairs and all(s.ids for s in sources):
        return matrix
    squared = np.zeros((len(new_pairs), spec.num_layers, spec.num_experts), dtype=np.float64)
    compared = [pairs[i] for i in new_pairs]

    def one(
        job: tuple[int, int, str, str],
    ) -> tuple[int, int, np.ndarray, list[str], dict[int, str]]:
        layer, expert, _, tensor = job
        first = first_of_equal(sources, tensor)
        each = sorted(set(first))
        reader = Reader(objects, dtype)
        arrays = {i: reader.read(sources[i], tensor) for i in each}
        apart = sorted({(first[a], first[b]) for a, b in compared if first[a] != first[b]})
        numbers = [(each.index(a), each.index(b)) for a, b in apart]
        found, finite = compare(list(arrays.values()), numbers)
        for at in np.flatnonzero(~finite):
            refuse_not_finite(sources[each[int(at)]], tensor, dtype)
        squares = dict(zip(apart, found, strict=True))
        part = np.array([squares.get((first[a], first[b]), 0.0) for a, b in compared])
        ids = {
            i: sources[i].ids.get(tensor)
            or _keep(objects, sources[i].refs[tensor], arrays[i], refer)
            for i in each
        }
        stored = {place_of(sources[i].refs[tensor]): ids[i] for i in each}
        bases: dict[int, str] = {}
        for i, source in enumerate(sources):
            ref = source.refs[tensor]
            if isinstance(ref, AdaptedTensor) and not ref.replaced:
                place = place_of(ref.start)
                if place not in stored:
                    stored[place] = _keep(objects, ref.start, reader.base(ref), refer)
                bases[i] = stored[place]
        return layer, expert, part, [ids[i] for i in first], bases

    jobs = list(family.iter_expert_tensors(config))
    tensor_bytes = max(int(np.prod(shape)) for _, shape in spec.projections) * 4
    with (
        ThreadPoolExecutor(_workers(len(sources) * tensor_bytes)) as pool,
        progress("comparing and storing experts", len(jobs)) as advance,
    ):
        done = zip(jobs, pool.map(one, jobs), strict=True)
        for job, (layer, expert, part, ids, bases) in done:
            squared[:, layer, expert] += part
            for i, object_id in bases.items():
                sources[i].base_ids[job[3]] = object_id
            for source, object_id in zip(sources, ids, strict=True):
                source.ids[job[3]] = object_id
            advance()
    matrix[new_pairs] = np.sqrt(squared)
    return matrix


def _store_non_experts(
    objects: Objects, sources: Sequence[Source], dtype: str, progress: Progress
) -> None:
    of_place: dict[Hashable, list[tuple[Source, str]]] = {}
    for s in sources:
        for tensor in s.family.non_expert_shapes(s.config):
            if tensor not in s.ids:
                of_place.setdefault(place_of(s.refs[tensor]), []).append((s, tensor))
    jobs = [owners[0] for owners in of_place.values()]
    if not jobs:
        return

    def one(job: tuple[Source, str]) -> str:
        source, tensor = job
        array = Reader(objects, dtype).read(source, tensor)
        if not compare([array], [])[1][0]:
            refuse_not_finite(source, tensor, dtype)
        return objects.put(array)

    largest = max(s.refs[t].nbytes for s, t in jobs) * 2
    with (
        ThreadPoolExecutor(_workers(largest)) as pool,
        progress("storing non-expert weights", len(jobs)) as advance,
    ):
        for owners, object_id in zip(of_place.values(), pool.map(one, jobs), strict=True):
            for source, tensor in owners:
                source.ids[tensor] = object_id
            advance()


def _keep(objects: Objects, ref: TensorSource, array: np.ndarray, refer: bool) -> str:
    if refer and isinstance(ref, TensorRef) and ref.dtype == array.dtype.name:
        return objects.refer(array, ref)
    return objects.put(array)


def _workers(bytes_each: int) -> int:
    return max(1, min(4, os.cpu_count() or 1, IN_FLIGHT_BYTES // max(1, bytes_each)))


def _contents(sources: Sequence[Source]) -> np.ndarray:
    """int64 [tenants, layers, experts]: equal numbers where experts are bit for bit the same."""
    family, spec = sources[0].family, sources[0].config.experts
    numbers: dict[tuple[str, ...], int] = {}
    contents = np.zeros((len(sources), spec.num_layers, spec.num_experts), dtype=np.int64)
    for t, source in enumerate(sources):
        for layer in range(spec.num_layers):
            for expert in range(spec.num_experts):
                key = tuple(
                    source.ids[family.expert_tensor(source.config, layer, expert, p)]
                    for p, _ in spec.projections
                )
                contents[t, layer, expert] = numbers.setdefault(key, len(numbers))
    return contents
