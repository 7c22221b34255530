"""The engine over meshes of 8 virtual CPU devices: equal to one device, experts never gathered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common import SamplingParams, load_engine
from tests.helpers import assert_close, build_round_robin, padded, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily
from tests.jax_engine.test_steps import backend_of, backend_rows, lowered_decode
from tests.switch_models import hf_logits, oracle

pytestmark = pytest.mark.skipif(
    len(jax.devices("cpu")) < 8, reason="needs 8 virtual CPU devices: see tests/conftest.py"
)

MESHES = [(2, 4), (1, 1), (8, 1), (1, 8), (4, 2), (1, 3)]
FREE = SamplingParams(max_new_tokens=5, ignore_eos=True)


@pytest.mark.parametrize("slots", rest_slow([None, 9]))
@pytest.mark.parametrize("mesh", rest_slow(MESHES), ids=str)
def test_equal_to_hugging_face_and_to_one_device(
    switch_family: SwitchFamily, tmp_path: Path, mesh: tuple[int, int], slots: Any
) -> None:
    if slots and mesh not in ((2, 4), (1, 3)):
        pytest.skip("misses are tested on two meshes")
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=slots)
    rows, answers = prompts(0, [9, 4, 17]), np.array(prompts(1, [6, 6, 6]))
    ids, mask = padded(rows)
    with load_engine(store, mesh=mesh) as engine, load_engine(store) as alone:
        assert engine.stats()["experts"] == "mesh"
        for i in (0, 2):
            name = engine.tenants[i]
            found = engine.logits(name, ids, answers, mask)
            assert_close(
                found, hf_logits(oracle(switch_family.models, i, store.plan), ids, answers, mask)
            )
            assert_close(found, alone.logits(name, ids, answers, mask), tolerance=2e-5)
            for ours, theirs in zip(
                *(e.generate_batch([(name, r) for r in rows], FREE) for e in (engine, alone)),
                strict=True,
            ):
                assert ours.token_ids == theirs.token_ids
                assert (ours.timings.hits, ours.timings.misses) == (
                    theirs.timings.hits,
                    theirs.timings.misses,
                )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", rest_slow([(2, 4), (1, 4), (4, 2)]), ids=str)
def test_experts_stay_sharded(
    switch_family: SwitchFamily, tmp_path: Path, mesh: tuple[int, int]
) -> None:
    """Each device holds its share of the slots, and the compiled step moves no array of an expert's
    size."""
    with load_engine(
        build_round_robin(tmp_path / "store", switch_family.paths), mesh=mesh
    ) as engine:
        backend = backend_of(engine)
        for leaf in backend.loaded.pool.leaves:
            assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // mesh[1]
        lowered, _ = lowered_decode(backend, backend_rows(engine, [[5, 6, 7]] * 4))
        text = lowered.compile().as_text()
        spec = engine.store.experts
        weights = spec.hidden_size * spec.intermediate_size
        moved = re.findall(
            r"= \S*?f32\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute|all-reduce)\(",
            text,
        )
        assert any(kind == "all-reduce" for _, kind in moved)  # the sum over the axis of experts
        assert all(np.prod([int(n) for n in shape.split(",") if n]) < weights for shape, _ in moved)
        # What a device computes with has the local number of slots.
        local = spec.num_experts // mesh[1]
        assert f"f32[{local},{spec.intermediate_size},{spec.hidden_size}]" in text
        assert f"f32[{spec.num_experts},{spec.intermediate_size},{spec.hidden_size}]" not in text


@pytest.mark.slow
def test_switching_on_a_mesh_compiles_nothing(switch_family: SwitchFamily, tmp_path: Path) -> None:
    with load_engine(
        build_round_robin(tmp_path / "store", switch_family.paths), mesh=(2, 4)
    ) as engine:
        engine.generate("base", [5, 6, 7], FREE)
        before = engine.stats()["compilations"]
        for name in ("ana", "bob", "base"):
            engine.generate(name, [5, 6, 7], FREE)
        assert engine.stats()["compilations"] == before
        assert engine.stats()["device"] == "cpu x 8"
