"""What engines and transformers make of a store: shared, exported, replaced and damaged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM

from common import StoreError, add_tenant, load_engine, remove_tenant
from common.build.examples import CalibrationSet
from tests import helpers
from tests.conftest import Family
from tests.helpers import build_round_robin


def test_tenants_of_identical_tensors_share_without_loss(tmp_path: Path) -> None:
    base = helpers.random_mixtral(0)
    lora = copy.deepcopy(base)  # touches attention alone, as a merged LoRA of q and v does
    for layer in lora.model.layers:
        layer.self_attn.q_proj.weight.data += 0.1
    half = copy.deepcopy(lora)  # and one expert
    half.model.layers[1].mlp.experts.down_proj.data[3] += 0.1
    models = {"base": base, "lora": lora, "half": half}
    paths = {n: helpers.save(m, tmp_path / n) for n, m in models.items()}
    store = build_round_robin(tmp_path / "store", paths, slots="all")
    row = helpers.prompts(0, [12])
    with load_engine(store) as shared:
        for name, path in paths.items():
            with load_engine(build_round_robin(tmp_path / f"only-{name}", {name: path})) as alone:
                assert np.array_equal(shared.logits(name, row), alone.logits(name, row))


def test_an_engine_goes_on_when_its_store_is_replaced(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "store"
    build_round_robin(path, family.paths, slots=3)
    engine = load_engine(
        path, spare_slots=1
    )  # goes on with the files that it has mapped, misses included
    row = helpers.prompts(0, [6])
    with load_engine(path) as other_engine:
        before = other_engine.logits("ana", row)
    build_round_robin(path, {"ana": family.paths["ana"]}, slots=2)
    helpers.assert_close(engine.logits("ana", row), before)
    assert engine.stats()["fetches"] > 0


def test_tenants_of_other_precision_answer_right(family: Family, tmp_path: Path) -> None:
    half = helpers.save(copy.deepcopy(family.models[1]).to(torch.bfloat16), tmp_path / "half")
    narrow = helpers.save(copy.deepcopy(family.models[2]).half(), tmp_path / "narrow")
    store = build_round_robin(
        tmp_path / "store", {"base": family.paths["base"], "half": half, "narrow": narrow}
    )
    models = [family.models[0], helpers.load(half), helpers.load(narrow)]
    rows = helpers.prompts(0, [9])
    with load_engine(store) as engine:
        for i, name in enumerate(store.tenants):
            helpers.assert_close(
                engine.logits(name, rows),
                helpers.hf_logits(helpers.oracle(models, i, store.plan), rows),
            )
    float16 = build_round_robin(tmp_path / "float16", {"narrow": narrow})
    with load_engine(float16, device="cpu") as engine:
        assert engine.stats()["dtype"] == "float32"  # which holds every float16 value
        helpers.assert_close(engine.logits("narrow", rows), helpers.hf_logits(models[2], rows))


@pytest.mark.parametrize("slots", [4, None, "all"])
def test_transformers_reads_an_export_as_the_tenant_is_served(
    family: Family, tmp_path: Path, slots: Any
) -> None:
    store = build_round_robin(tmp_path / "store", family.paths, slots=slots)
    rows = helpers.prompts(0, [14])
    with load_engine(store) as engine:
        for i, name in enumerate(store.tenants):
            store.export(name, tmp_path / f"out-{name}")
            model = helpers.load(tmp_path / f"out-{name}")
            expected = helpers.hf_logits(helpers.oracle(family.models, i, store.plan), rows)
            helpers.assert_close(helpers.hf_logits(model, rows), expected, tolerance=1e-6)
            helpers.assert_close(engine.logits(name, rows), expected)


def test_export_of_a_tied_tenant_and_of_bfloat16(tmp_path: Path) -> None:
    model = helpers.random_mixtral(0, tie_word_embeddings=True).to(torch.bfloat16)
    store = build_round_robin(tmp_path / "store", {"tied": helpers.save(model, tmp_path / "tied")})
    store.export("tied", tmp_path / "out")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert again.dtype == torch.bfloat16
    rows = helpers.prompts(0, [8])
    assert np.array_equal(
        helpers.hf_logits(again, rows),
        helpers.hf_logits(helpers.load(tmp_path / "tied", "bfloat16"), rows),
    )


def test_a_tenant_that_joined_in_the_stores_type_answers_right(
    family: Family, tmp_path: Path
) -> None:
    half = helpers.save(copy.deepcopy(family.models[0]).to(torch.bfloat16), tmp_path / "half")
    store = build_round_robin(tmp_path / "store", {"half": half})
    grown = add_tenant(store.path, "ana", family.paths["ana"])
    assert grown.dtype == "bfloat16" and grown.tenant("half").notes == ()
    assert "converted from float32 to bfloat16 (rounded)" in grown.tenant("ana").notes[0]
    rounded = helpers.load(
        helpers.save(copy.deepcopy(family.models[1]).to(torch.bfloat16), tmp_path / "rounded")
    )
    rows = helpers.prompts(0, [9])
    expected = helpers.hf_logits(helpers.oracle([helpers.load(half), rounded], 1, grown.plan), rows)
    with load_engine(grown, dtype="float32") as engine:
        helpers.assert_close(engine.logits("ana", rows), expected)


def test_damaged_calibration_is_never_planned_with(family: Family, tmp_path: Path) -> None:
    sets = {"ana": CalibrationSet.texts(helpers.prompts(0, [20] * 3))}
    store = build_round_robin(tmp_path / "store", family.paths, slots=5, calibration=sets)
    kept = store.manifest.calibration["ana"]["objects"]["inputs"]
    helpers.flip(store, kept)
    before = helpers.fingerprint(store.path)
    with pytest.raises(StoreError, match=rf"{kept} does not match its checksum"):
        remove_tenant(store.path, "bob")
    assert helpers.fingerprint(store.path) == before


def test_an_engine_names_a_missing_file(family: Family, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", family.paths)
    path = store.objects.path(store.tenant("ana").tensors["model.layers.0.self_attn.o_proj.weight"])
    path.unlink()
    with pytest.raises(StoreError, match=rf"{path}: the file is missing.*build the store again"):
        load_engine(store)
