"""Change a store in one step: lock, write beside, replace the manifest, sweep."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.safetensors_file import fsync
from common.dtypes import BY_NAME
from common.errors import PlanError, StoreError
from common.plan.plan import MERGED, Plan
from common.store.lock import FILE as LOCK_FILE
from common.store.lock import exclusive
from common.store.manifest import BESIDE, Manifest
from common.store.objects import Objects
from common.store.store import Store, is_store


def set_plan(
    path: str | Path,
    plan: Plan,
    merged: Mapping[int, Mapping[str, np.ndarray]] | None = None,
    records: Sequence[np.ndarray] = (),
) -> Store:
    """Give a store another plan for the same tenants.

    merged: slot of each merged copy -> projection -> [out, in], converted to the store's type.
    records: uint8 [bytes] of each of `plan.residuals`, in order; see `common.plan.residual`.

    Raises PlanError, StoreError; the store is then as it was.
    """
    merged = merged or {}
    path = Path(path)
    Store.open(path)
    with new_or_existing(path) as directory:
        store = Store.open(directory)
        commit(directory, with_plan(store, plan, merged, records, None))
    return Store.open(path)


def with_plan(
    store: Store,
    plan: Plan,
    merged: Mapping[int, Mapping[str, np.ndarray]],
    records: Sequence[np.ndarray],
    prediction: Mapping[str, Any] | None,
) -> Manifest:
    spec, manifest = store.experts, store.manifest
    shapes = dict(spec.projections)
    if (plan.tenants, plan.num_layers, plan.num_experts) != (
        store.tenants,
        spec.num_layers,
        spec.num_experts,
    ):
        raise PlanError(
            f"the plan is for other tenants or another shape than the store {store.path}"
        )
    if set(merged) != {slot for slot, copy in enumerate(plan.copies) if copy.owner == MERGED}:
        raise PlanError("weights must be given for each merged copy of the plan, and for no other")
    if len(records) != len(plan.residuals):
        raise PlanError(f"{len(records)} records for {len(plan.residuals)} residuals of the plan")
    entries: dict[str, dict[str, Any]] = {
        i: dict(manifest.objects[i]) for t in manifest.tenants for i in t.object_ids()
    }
    for object_id in manifest.measured_ids():
        entries[object_id] = dict(manifest.objects[object_id])

    put = putter(store.objects, entries)
    ids: dict[int, dict[str, str]] = {}
    for slot, matrices in merged.items():
        if {p: tuple(m.shape) for p, m in matrices.items()} != shapes:
            raise PlanError(f"merged copy {slot} has other matrices than {shapes}")
        ids[slot] = {
            p: put(m.astype(BY_NAME[store.dtype], copy=False)) for p, m in matrices.items()
        }
    for residual, record in zip(plan.residuals, records, strict=True):
        if record.dtype != np.uint8 or record.shape != (residual.nbytes(shapes),):
            raise PlanError(
                f"the record of {residual} is {record.dtype} {list(record.shape)}, not what its "
                "parts need"
            )
    kept = tuple(put(record) for record in records)
    provenance = {
        key: value for key, value in manifest.provenance.items() if key != BESIDE
    }  # it is for all tenants
    return replace(
        manifest,
        plan=plan,
        objects=entries,
        merged=ids,
        residuals=kept,
        prediction=prediction,
        provenance=provenance,
    )


def putter(objects: Objects, entries: dict[str, dict[str, Any]]) -> Callable[[np.ndarray], str]:
    """Stores an array and lists it among a manifest's objects."""

    def put(array: np.ndarray) -> str:
        object_id = objects.put(array)
        entries[object_id] = {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "bytes": array.nbytes,
        }
        return object_id

    return put


@contextmanager
def new_or_existing(path: Path) -> Iterator[Path]:
    """The directory to write into: the store itself, or one beside it that becomes the store when
    the block ends well.

    If the block fails, files that it added to an existing store are removed, and so is the
    directory of a new one.
    """
    try:
        if is_store(path):
            with exclusive(path):
                try:
                    yield path
                except BaseException:
                    # A store whose manifest is damaged is left alone: what its files are for is not
                    # known.
                    with suppress(StoreError):
                        sweep(path, Manifest.read(path))
                    raise
            return
        place = path.resolve()  # the directory itself, where a symbolic link leads to it
        if place == Path.cwd():
            raise StoreError(
                f"{path}: the directory you are in cannot become a store; name one in it, such as "
                "./store"
            )
        staging = place.with_name(f".{place.name}.building")
        staging.mkdir(parents=True, exist_ok=True)
        with exclusive(staging):
            for leftover in staging.iterdir():  # of a build that was killed: its lock is free
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK_FILE:
                    leftover.unlink()
            try:
                yield staging
                os.replace(staging, place)
                fsync(place.parent)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error}; free some space or choose another place"
        ) from error


def commit(directory: Path, manifest: Manifest) -> None:
    for folder in sorted((directory / "objects").glob("*")):
        fsync(folder)
    manifest.write(directory)
    sweep(directory, manifest)


def sweep(directory: Path, manifest: Manifest) -> None:
    """Remove what the manifest does not refer to."""
    Objects(directory / "objects").sweep(set(manifest.objects))
    folders = {t.assets_folder for t in manifest.tenants}
    for folder in (directory / "assets").glob("*"):
        if folder.name not in folders:
            shutil.rmtree(folder)
    for partial in directory.glob("*.partial"):
        partial.unlink()
