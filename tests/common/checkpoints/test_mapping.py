"""Mappings of files cost no descriptor, and their pages are the file's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.checkpoints.mapping import map_bytes


def test_mappings_hold_no_descriptors_and_no_memory(tmp_path: Path) -> None:
    """More mappings than a process may have open files; pages are the file's, and go with the
    array."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    before = len(list(Path("/proc/self/fd").iterdir()))
    arrays = [map_bytes(path, offset, 100) for offset in range(3000)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(bytes(a) == (bytes(range(256)) * 64)[i : i + 100] for i, a in enumerate(arrays))
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    view = arrays[7].view(np.uint16)[3:]
    assert mappings() > 0
    del arrays
    assert mappings() == 1 and view.base is not None
    del view
    assert mappings() == 0
    assert map_bytes(path, 5, 0).size == 0
    with pytest.raises(OSError, match="the file ends before"):
        map_bytes(path, 256 * 64 - 5, 10)
