"""Mappings of files cost no descriptor, and their pages are the file's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.checkpoints.mapped_file import MappedFile


def test_mappings_hold_no_descriptors_and_no_memory(tmp_path: Path) -> None:
    """Views of a file share one mapping, which goes with the last of them."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    before = len(list(Path("/proc/self/fd").iterdir()))
    files = [MappedFile(path) for _ in range(1500)]
    arrays = [file.part(offset, 100) for file in files for offset in (0, 7)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    content = path.read_bytes()
    assert all(bytes(a) == content[i % 2 * 7 :][:100] for i, a in enumerate(arrays))
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    view = arrays[7].view(np.uint16)[3:]
    assert mappings() == len(files)
    assert bytes(view) == content[13:107]
    del arrays, files
    assert mappings() == 1 and view.base is not None
    del view
    assert mappings() == 0
    assert MappedFile(path).part(5, 0).size == 0
    with pytest.raises(OSError, match="the file ends before"):
        MappedFile(path).part(256 * 64 - 5, 10)
