"""Files of a change that is not done, in a folder of the store or of the one that is being built.

What took long to find is kept there until the change is done, so that a change that was stopped
goes on where it was when it is asked for again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.safetensors_file import TensorRef, fsync, read_header, write_file
from common.errors import CheckpointError, StoreError

FOLDER = "unfinished"
_ABOUT = "about"


def folder_of(directory: Path) -> Path:
    """Of a store's directory, or of the one that it is built in."""
    return directory / FOLDER


def write(path: Path, about: Callable[[Callable[[np.ndarray], str]], Mapping[str, Any]]) -> None:
    """Write one file in one step.

    about: is given what keeps an array (float32, uint8) and returns its name, and returns what JSON
        can hold.

    Raises StoreError.
    """
    arrays: dict[str, np.ndarray] = {}

    def put(array: np.ndarray) -> str:
        name = str(len(arrays))
        arrays[name] = array
        return name

    text = json.dumps(about(put)).encode()
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(exist_ok=True)
        write_file(partial, {_ABOUT: np.frombuffer(text, np.uint8), **arrays})
        fsync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}; free some space") from error


def read(path: Path) -> tuple[dict[str, Any], dict[str, TensorRef]] | None:
    """What was written, and its arrays by name; None where there is none, or no whole one."""
    if not path.exists():
        return None
    try:
        refs = read_header(path)
        return json.loads(refs.pop(_ABOUT).read().tobytes()), refs
    except (CheckpointError, KeyError, ValueError):
        return None
