"""Random models: made once, and their routers spread tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.material import random_models
from common import load_engine


def test_random_stores_are_made_once(tmp_path: Path) -> None:
    store = random_models.random_store(tmp_path, "tiny-mixtral", 2, "bfloat16")
    assert store.tenants == ("tenant0", "tenant1") and store.dtype == "bfloat16"
    assert store.plan.num_slots == store.experts.num_positions
    assert store.distances.matrix.min() > 0  # no expert is shared by chance
    (kept,) = tmp_path.iterdir()  # the checkpoints are gone
    before = kept.stat().st_mtime_ns
    assert random_models.random_store(tmp_path, "tiny-mixtral", 2, "bfloat16").path == store.path
    assert kept.stat().st_mtime_ns == before
    other = random_models.random_store(tmp_path, "tiny-mixtral", 2, "float32")
    assert other.path != store.path
    with load_engine(other, device="cpu", products="plain") as engine:
        picked: set[int] = set()

        def look(tenant: str, layer: int, x: Any, ids: Any, gates: Any) -> None:
            picked.update(ids.reshape(-1).tolist())

        engine.observe(look)
        engine.logits("tenant1", [list(range(3, 60))])
    assert picked == {0, 1, 2, 3}
