"""Directories that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.checkpoints.safetensors_file import fsync
from common.errors import CheckpointError


@contextmanager
def new_directory(target: str | Path, example: str = "out") -> Iterator[Path]:
    """An empty directory beside `target`, which becomes `target` if the block ends well and is
    removed if it does not. example: a name for it that errors suggest.

    Raises CheckpointError if `target` exists and is not an empty directory, or cannot be written.
    """
    target = Path(target).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not an empty directory; name another one")
    if target == Path.cwd():
        raise CheckpointError(
            f"{target}: the directory you are in cannot be replaced; name one in it, such as "
            f"./{example}"
        )
    partial = target.with_name(f".{target.name}.partial")
    try:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            if partial.exists():  # of a run that was killed
                shutil.rmtree(partial)
            partial.mkdir()
            yield partial
            for path in partial.rglob("*"):
                fsync(path)
            if target.exists():
                target.rmdir()
            partial.rename(target)
            fsync(target.parent)
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot be written: {error}; free some space or choose another place"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
