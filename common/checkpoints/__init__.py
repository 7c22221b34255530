"""Lazy readers and writers of checkpoints. A reader gives canonical names; each tensor is read or mapped on its own."""

from __future__ import annotations

from pathlib import Path

from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.hugging_face import is_hugging_face, open_hugging_face, write_hugging_face
from common.checkpoints.safetensors_file import TensorRef
from common.errors import CheckpointError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory of any supported format, told apart by content.

    Raises CheckpointError that names the directory, file or tensor at fault.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a checkpoint directory (config.json with safetensors)")
    if is_hugging_face(path):
        return open_hugging_face(path)
    raise CheckpointError(f"{path}: no checkpoint recognised here; expected config.json with safetensors weights")


__all__ = ["Checkpoint", "TensorRef", "open_checkpoint", "write_hugging_face"]
