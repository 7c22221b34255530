"""The content-addressed part of a store: tensors by the hash of what they hold, many in a file.

Equal tensors have equal ids, so each is on disk once whoever owns it. Files, called shards, are
never changed once written, and appear under their names only when whole.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from common.checkpoints.mapped_file import MappedFile
from common.checkpoints.safetensors_file import TensorRef
from common.dtypes import BY_NAME
from common.errors import CheckpointError, StoreError
from common.store.shards import (
    SINGLE_OFFSET,
    Entry,
    is_mostly_unused,
    shard_damage,
    single_offset,
    write_shard,
)

SHARD_BYTES = 256 << 20
"""Tensors that wait for their shard are held in memory; a larger one is a shard of its own."""

SHARD_TENSORS = 1 << 14


def content_id(array: np.ndarray) -> str:
    """Hex SHA-256 over type, shape and the bytes in C order."""
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


_State = tuple[int, int, int]


class Objects:
    """The `objects/` directory of one store. Threads may put at once.

    entries: by id, of all that is known; what was put comes in when its shard is written.
    """

    def __init__(self, root: Path, entries: Mapping[str, Entry]):
        self.root = root
        self.entries = dict(entries)
        self._waiting: dict[str, np.ndarray] = {}
        self._waiting_bytes = 0
        self._files: dict[str, MappedFile] = {}
        self._sound: set[str] = set()  # what this process wrote, or compared with its id
        self._compared: dict[str, _State | None] = {}  # checkpoints' tensors, as files then were
        self._ends: dict[str, int] = {}
        self._lock = threading.RLock()

    def path(self, object_id: str) -> Path:
        """The file that holds an object."""
        return self.root / self.entries[object_id].shard

    def put(self, array: np.ndarray) -> str:
        """Keep an array, unless it is there and as it was written; returns its id.

        Raises StoreError where its shard cannot be written.
        """
        object_id = content_id(array)
        with self._lock:
            if object_id in self._waiting:
                return object_id
            known = self.entries.get(object_id)
        if known is not None and known.in_store:
            if object_id in self._sound or self.damage(object_id) is None:
                self._sound.add(object_id)
                return object_id
        with self._lock:
            self._wait(object_id, array)
        return object_id

    def _wait(self, object_id: str, array: np.ndarray) -> None:
        """Have an array wait for its shard; write that once it is large enough."""
        if object_id not in self._waiting:
            self._waiting[object_id] = array
            self._waiting_bytes += array.nbytes
        if self._waiting_bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_TENSORS:
            self.flush()

    def refer(self, array: np.ndarray, ref: TensorRef) -> str:
        """Keep where an array lies in a checkpoint, in place of the array; returns its id."""
        object_id = content_id(array)
        with self._lock:
            if object_id not in self.entries and object_id not in self._waiting:
                path = str(ref.path.resolve())
                self.entries[object_id] = Entry(ref.dtype, tuple(ref.shape), path, ref.offset)
        return object_id

    def flush(self) -> None:
        """Write what waits as a shard. Raises StoreError."""
        with self._lock:
            if not self._waiting:
                return
            written = write_shard(self.root, self._waiting)
            for entry in written.values():
                self._files.pop(entry.shard, None)
            self.entries.update(written)
            self._sound.update(written)
            self._waiting.clear()
            self._waiting_bytes = 0

    def entry(self, object_id: str) -> Entry:
        """Raises KeyError for what is not here."""
        with self._lock:
            if object_id in self._waiting:
                self.flush()
            return self.entries[object_id]

    def ref(self, object_id: str) -> TensorRef:
        """Where an object lies, `file_tensor` being its id. Its content is not looked at (see
        `damage`). Raises StoreError where a file's header must be read and does not fit."""
        entry = self.entry(object_id)
        path = self.root / entry.shard
        if entry.offset == SINGLE_OFFSET:
            entry = entry._replace(offset=single_offset(self.root, entry))
            self.entries[object_id] = entry
        file = self._files.setdefault(entry.shard, MappedFile(path))
        if not file.is_mapped:
            self._check_file(path, entry.shard)
        return TensorRef(path, object_id, entry.dtype, entry.shape, entry.offset, file)

    def _check_file(self, path: Path, shard: str) -> None:
        """Raises StoreError for a file that is missing, or ends before its last object."""
        if shard not in self._ends:
            for entry in self.entries.values():
                end = entry.offset + entry.nbytes
                self._ends[entry.shard] = max(end, self._ends.get(entry.shard, 0))
        mend = "restore it from a backup, or build the store again"
        if not path.is_file():
            raise StoreError(f"{path}: the file is missing; {mend}")
        size = path.stat().st_size
        if size < self._ends[shard]:
            raise StoreError(
                f"{path}: is truncated or damaged, {size} of {self._ends[shard]} bytes are here; "
                f"{mend}"
            )

    def hold(self, object_ids: Iterable[str]) -> None:
        """Map the files of some objects, so that what happens to them later does no harm.

        Raises StoreError for one that is missing or ends too early.
        """
        for i in {self.entry(i).shard: i for i in object_ids}.values():
            self.ref(i).map()

    def read(self, ref: TensorRef) -> np.ndarray:
        """What `ref` of this store says, compared with its checksum. Raises StoreError.

        For whatever is measured or made from it: damage would become what the store says is right.
        """
        array = ref.read()
        self.check(ref, array)
        return array

    def map(self, ref: TensorRef) -> np.ndarray:
        """A view of the file, for serving. What lies in a checkpoint is compared with its checksum,
        once and again when others changed the file. Raises StoreError."""
        array = ref.map()
        if not self.entries[ref.file_tensor].in_store:
            state = _state(ref.path)
            if state is None or self._compared.get(ref.file_tensor) != state:
                self.check(ref, array)
                self._compared[ref.file_tensor] = state
        return array

    def check(self, ref: TensorRef, array: np.ndarray) -> None:
        """Compare what was read or mapped at `ref` with its checksum. Raises StoreError that names
        the file."""
        if content_id(array) == ref.file_tensor:
            return
        if str(ref.path) == self.entries[ref.file_tensor].shard:
            raise StoreError(
                f"{ref.path}: is not as it was when the store was built, which refers to it; "
                "restore it, or build the store again"
            )
        raise StoreError(
            f"{ref.path}: tensor {ref.file_tensor} does not match its checksum; `moetel verify "
            f"{self.root.parent}` lists all "
            "damaged files; restore them from a backup or build the store again"
        )

    def shard_damage(self, object_id: str) -> str | None:
        """What is wrong with an object's file as a whole, or None. Checkpoints are not looked
        at."""
        entry = self.entries[object_id]
        return shard_damage(self.root, entry.shard) if entry.in_store else None

    def damage(self, object_id: str) -> str | None:
        """Read a whole object and say what is wrong with it, or None."""
        try:
            if content_id(self.ref(object_id).read()) != object_id:
                return "content does not match its checksum"
        except (StoreError, CheckpointError) as error:
            return str(error)
        return None

    def compact(self, keep: Iterable[str]) -> dict[str, Entry]:
        """Write what waits, and anew what is kept of shards of which less than half is.

        Returns the entries of `keep`. Raises StoreError.
        """
        kept = set(keep)
        self.flush()
        used: dict[str, int] = {}
        for object_id in kept:
            entry = self.entries[object_id]
            used[entry.shard] = used.get(entry.shard, 0) + entry.nbytes
        mostly_unused = {
            shard for shard, nbytes in used.items() if is_mostly_unused(self.root, shard, nbytes)
        }
        for object_id in sorted(kept):
            if self.entries[object_id].shard in mostly_unused:
                self.move(object_id)
        self.flush()
        for object_id in kept:  # places that only a header says
            self.ref(object_id)
        return {object_id: self.entries[object_id] for object_id in kept}

    def move(self, object_id: str) -> None:
        """Write an object anew, in another shard. Raises StoreError if it is damaged."""
        array = self.read(self.ref(object_id))
        with self._lock:
            self._wait(object_id, array)

    def sweep(self, keep: Iterable[str]) -> None:
        """Remove every file that holds none of the objects in `keep`, leftovers of killed builds
        included."""
        for path in self.unreferenced(keep):
            path.unlink(missing_ok=True)
        for folder in list(self.root.glob("*")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def unreferenced(self, keep: Iterable[str]) -> list[Path]:
        shards = {self.root / self.entries[i].shard for i in keep}
        return sorted(p for p in self.root.rglob("*") if p.is_file() and p not in shards)


def _state(path: Path) -> _State | None:
    """What changes when a file is written or replaced; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def check_dtype(name: str) -> None:
    if name not in BY_NAME:
        raise StoreError(f"dtype {name!r} is not one of auto, {', '.join(BY_NAME)}")
