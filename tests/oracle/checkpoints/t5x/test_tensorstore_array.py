"""Arrays in chunks: read in blocks, written one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoints import (
    open_checkpoint,
    t5x_names,
    tensorstore_array,
)
from common.checkpoints.tensorstore_array import even_chunks
from tests import switch
from tests.oracle.checkpoints.t5x.same import WI


def test_experts_are_read_in_blocks(
    parameters: dict[str, np.ndarray], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks here hold two experts: a block of two is decoded once, kept until both are out, and
    then dropped."""
    reads: list[tuple[str, int]] = []
    read = tensorstore_array.StoredArray.read

    def counting(self: tensorstore_array.StoredArray, rows: slice | None = None) -> np.ndarray:
        found = read(self, rows)
        reads.append((self.name, found.nbytes))
        return found

    monkeypatch.setattr(tensorstore_array.StoredArray, "read", counting)
    each = parameters[WI][0].nbytes
    monkeypatch.setattr(tensorstore_array, "BLOCK_BYTES", 2 * each)
    monkeypatch.setattr(tensorstore_array, "KEPT_BYTES", 6 * each)
    found = open_checkpoint(checkpoint)
    for name, array in found.stream():
        source: Any = found.tensors[name]
        assert array.flags.writeable
        assert sum(b.data.nbytes for b in source.blocks._blocks.values()) <= 6 * each
    assert [r for r in reads if r[0] == f"target.{WI}"] == [(f"target.{WI}", 2 * each)] * 2
    assert not source.blocks._blocks
    # In any order, and again: what was dropped is read anew.
    names = [n for n in found.tensors if "expert_" in n]
    for name in [*reversed(names), *names]:
        assert found.tensors[name].read().nbytes == found.tensors[name].nbytes
        assert sum(b.data.nbytes for b in source.blocks._blocks.values()) <= 6 * each


def test_writing_holds_one_array(tmp_path: Path) -> None:
    switch.random_switch().save_pretrained(tmp_path / "hf")
    alive: list[weakref.ref[np.ndarray]] = []
    for _, _, array in t5x_names.stream_arrays(open_checkpoint(tmp_path / "hf")):
        assert sum(r() is not None for r in alive) <= 1  # the loop's own, until it takes the next
        alive.append(weakref.ref(array))


@pytest.mark.parametrize(
    ("shape", "limit", "chunk"),
    [
        ((8, 768, 3072), 1 << 24, [8, 768, 1536]),
        ((7, 5), 10, [1, 5]),
        ((13,), 4, [1]),
        ((4, 4), 16, [4, 4]),
        ((), 1, []),
    ],
)
def test_chunks_divide_evenly(shape: tuple[int, ...], limit: int, chunk: list[int]) -> None:
    assert even_chunks(shape, limit) == chunk
