"""Checkpoints as Hugging Face's own code writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.checkpoints import open_checkpoint, write_hugging_face
from common.dtypes import to_float32
from tests import helpers
from tests.conftest import Family

LAYOUTS: dict[str, dict[str, Any]] = {
    "classic": {},
    "fused": {"save_original_format": False},
    "classic shards": {"max_shard_size": "20KB"},
    "fused shards": {"save_original_format": False, "max_shard_size": "20KB"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_classic_tensors(layout: str, dtype: str, tmp_path: Path) -> None:
    model = helpers.random_mixtral(0).to(getattr(torch, dtype))
    classic = load_file(helpers.save(model, tmp_path / "classic") / "model.safetensors")
    path = helpers.save(model, tmp_path / "layout", **LAYOUTS[layout])
    assert (path / "model.safetensors.index.json").exists() == ("shards" in layout)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(classic)
    assert checkpoint.dtype == dtype
    for name, array in checkpoint.stream():
        assert array.dtype.name == dtype
        assert torch.equal(torch.from_numpy(to_float32(array)), classic[name].float()), name
        mapped = checkpoint.tensors[name].map()
        assert not mapped.flags.writeable
        assert np.array_equal(to_float32(mapped), to_float32(array))


@pytest.mark.parametrize("max_shard_bytes", [10_000, 1 << 30])
def test_transformers_reads_what_was_written(
    max_shard_bytes: int, family: Family, tmp_path: Path
) -> None:
    source = open_checkpoint(family.paths["base"])
    write_hugging_face(
        tmp_path, dict(source.config.raw), source.stream(), max_shard_bytes=max_shard_bytes
    )
    reloaded = helpers.load(tmp_path)
    assert all(
        torch.equal(p, q)
        for p, q in zip(reloaded.parameters(), family.models[0].parameters(), strict=True)
    )
