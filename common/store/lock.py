"""One writer at a time: an advisory lock that the kernel drops when its holder dies, killed or
not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; two writers at once are then not detected
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory's lock. Raises StoreError at once if another process holds it."""
    path = directory / FILE
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(
                    f"{directory}: another process is writing this store; wait for it to end"
                ) from error
            # A build that ended between our open and our lock has moved the directory away.
            if not path.exists() or path.stat().st_ino != os.fstat(fd).st_ino:
                raise StoreError(
                    f"{directory}: another process has just finished this store; run the command "
                    "again"
                )
        yield
    finally:
        os.close(fd)
