"""Change a store in one step: lock, write beside, replace the manifest, sweep."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.safetensors_file import fsync
from common.dtypes import BY_NAME
from common.errors import PlanError, StoreError
from common.plan.plan import MERGED, Plan
from common.store.index import PREFIX
from common.store.lock import FILE as LOCK_FILE
from common.store.lock import exclusive
from common.store.manifest import BESIDE, Manifest
from common.store.objects import Objects
from common.store.shards import Entry
from common.store.store import Store, is_store
from common.store.unfinished import folder_of


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
        commit(store.objects, with_plan(store, plan, merged, records, None))
    return Store.open(path)


def with_plan(
    store: Store,
    plan: Plan,
    merged: Mapping[int, Mapping[str, np.ndarray | str]],
    records: Sequence[np.ndarray | str],
    prediction: Mapping[str, Any] | None,
) -> Manifest:
    """The store's manifest with another plan; see `set_plan`. Arrays that were put away already are
    given by their ids."""
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
    for slot, matrices in merged.items():
        found = {p: shapes[p] if isinstance(m, str) else m.shape for p, m in matrices.items()}
        if found != shapes:
            raise PlanError(f"merged copy {slot} has other matrices than {shapes}")
    for residual, record in zip(plan.residuals, records, strict=True):
        if isinstance(record, str):
            continue
        if record.dtype != np.uint8 or record.shape != (residual.nbytes(shapes),):
            raise PlanError(
                f"the record of {residual} is {record.dtype} {list(record.shape)}, not what its "
                "parts need"
            )
    ids = {
        slot: {p: put(store, m) for p, m in matrices.items()} for slot, matrices in merged.items()
    }
    kept = tuple(put(store, record) for record in records)
    provenance = {
        key: value for key, value in manifest.provenance.items() if key != BESIDE
    }  # it is for all tenants
    return replace(
        manifest,
        plan=plan,
        merged=ids,
        residuals=kept,
        prediction=prediction,
        provenance=provenance,
    )


def put(store: Store, made: np.ndarray | str) -> str:
    """Keep a matrix in the store's type, or a record; what is an id is kept already."""
    if isinstance(made, str):
        return made
    dtype = made.dtype if made.dtype == np.uint8 else BY_NAME[store.dtype]
    return store.objects.put(made.astype(dtype, copy=False))


@contextmanager
def new_or_existing(path: Path) -> Iterator[Path]:
    """The directory to write into: the store itself, or one beside it that becomes the store when
    the block ends well.

    If the block fails, files that it added to an existing store are removed, and so is the
    directory of a new one. Where it is stopped, as by Ctrl-C, its unfinished work stays.
    """
    try:
        if is_store(path):
            with exclusive(path):
                try:
                    yield path
                except BaseException as error:
                    # A store whose manifest is damaged is left alone: what its files are for is not
                    # known.
                    with suppress(StoreError):
                        sweep(path, unfinished=isinstance(error, Exception))
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
            _clear(staging)  # of a build that was killed: its lock is free
            try:
                yield staging
                os.replace(staging, place)
                fsync(place.parent)
            except BaseException as error:
                _clear(staging)
                if isinstance(error, Exception) or not folder_of(staging).exists():
                    shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error}; free some space or choose another place"
        ) from error


def _clear(staging: Path) -> None:
    """Remove all but unfinished work and the lock."""
    for leftover in staging.iterdir():
        if leftover == folder_of(staging) or leftover.name == LOCK_FILE:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def known_objects(directory: Path) -> dict[str, Entry]:
    """What the store in a directory holds; nothing where there is none, or it is damaged."""
    with suppress(StoreError):
        return dict(Manifest.read(directory).objects)
    return {}


def commit(objects: Objects, manifest: Manifest) -> None:
    """Make a manifest, whose objects are among `objects`, what the store is."""
    directory = objects.root.parent
    manifest = replace(manifest, objects=objects.compact(manifest.object_ids()))
    if objects.root.is_dir():
        fsync(objects.root)
    manifest.write(directory)
    sweep(directory)


def sweep(directory: Path, unfinished: bool = True) -> None:
    """Remove what the manifest does not refer to, unfinished work included where that is said.

    Raises StoreError where the manifest is damaged.
    """
    manifest = Manifest.read(directory)
    Objects(directory / "objects", manifest.objects).sweep(manifest.objects)
    for path in directory.glob(f"{PREFIX}*"):
        if path.name != manifest.index_file:
            path.unlink()
    folders = {t.assets_folder for t in manifest.tenants}
    for folder in (directory / "assets").glob("*"):
        if folder.name not in folders:
            shutil.rmtree(folder)
    for partial in directory.glob("*.partial"):
        partial.unlink()
    if unfinished:
        shutil.rmtree(folder_of(directory), ignore_errors=True)
