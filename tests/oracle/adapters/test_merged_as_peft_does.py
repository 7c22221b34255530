"""Adapters as tenants answer as PEFT's models do: every form, of every family of decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import CheckpointError, Store, build_store, load_engine
from tests import families, helpers, switch_models
from tests.helpers import rest_slow
from tests.oracle.adapters import made

IDS, ANSWERS = [[1, 20, 30, 40, 77, 5]], [[0, 9, 33, 71]]
FUSED = ["experts.gate_up_proj", "experts.down_proj"]

# Of models as transformers 5 has them.
FORMS: dict[str, dict[str, Any]] = {
    "everything": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        "target_parameters": [*FUSED, "gate.weight", "router.weight"],
        "rank_pattern": {"gate_up_proj": 5, "layers.1.*q_proj": 2},
        "alpha_pattern": {r"experts\..*": 9},
    },
    "fused experts": {"target_modules": [], "target_parameters": FUSED},
    "down alone": {"target_modules": [], "target_parameters": FUSED[1:], "use_rslora": True},
    "gate and up alone": {"target_modules": ["q_proj"], "target_parameters": FUSED[:1]},
    "attention": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "bias": "all"},
    "router": {"target_modules": ["o_proj"], "target_parameters": ["gate.weight", "router.weight"]},
    "tables": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "saved table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved experts": {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "block_sparse_moe"]},
    "layers": {
        "target_modules": ["k_proj"],
        "layers_to_transform": [1],
        "fan_in_fan_out": True,
        "lora_dropout": 0.1,
    },
}
TIED = ("everything", "tables")  # of granitemoe, whose tables are tied

# By the names of transformers 4, which files have.
EXPERTS = {
    "mixtral": ["w1", "w2", "w3"],
    "qwen3_moe": ["gate_proj", "up_proj", "down_proj"],
    "olmoe": ["gate_proj", "up_proj", "down_proj"],
}
OLDER: dict[str, dict[str, Any]] = {
    "each expert": {"target_modules": ["experts"]},
    "one expert": {"target_modules": r".*experts\.2\.(w1|up_proj)"},
    "router and ranks": {
        "target_modules": ["gate", "q_proj", "experts"],
        "rank_pattern": {"gate": 2, "experts.1.*": 4, "self_attn.*": 5},
        "alpha_pattern": {".*0.*": 3},
        "use_rslora": True,
        "exclude_modules": ["q_proj"],
    },
}


def answers(base: Path, adapter: Path, work: Path) -> tuple[np.ndarray, Store]:
    """Logits of an adapter's tenant with nothing shared, and the store."""
    store = build_store(work / "store", {"b": base, "t": adapter}, slots="all", bases={"t": base})
    with load_engine(store.path, dtype="float32") as engine:
        moved = np.abs(engine.logits("t", IDS) - engine.logits("b", IDS)).max()
        assert moved > 0.1  # so that nothing passes by doing nothing
        return engine.logits("t", IDS), store


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", rest_slow(families.SIZES))
@pytest.mark.filterwarnings("ignore")
def test_forms_of_transformers_5(family: str, form: str, tmp_path: Path) -> None:
    model = families.random(family, 3)
    base = helpers.save(model, tmp_path / "base")
    config = made.peft.LoraConfig(r=3, lora_alpha=5, **FORMS[form])
    if family == "granitemoe" and form in TIED:
        made.adapter(model, config, tmp_path / "adapter")
        with pytest.raises(CheckpointError, match=r"ties to .*tie_word_embeddings"):
            answers(base, tmp_path / "adapter", tmp_path)
        return
    theirs = made.adapter(model, config, tmp_path / "adapter")
    found, _ = answers(base, tmp_path / "adapter", tmp_path)
    helpers.assert_close(found, helpers.hf_logits(theirs, IDS))
    helpers.assert_close(found, helpers.hf_logits(made.merged(theirs), IDS))


@pytest.mark.parametrize("form", OLDER)
@pytest.mark.parametrize("family", rest_slow(EXPERTS))
@pytest.mark.filterwarnings("ignore")
def test_forms_of_transformers_4(family: str, form: str, tmp_path: Path) -> None:
    base = helpers.save(families.random(family, 3), tmp_path / "base")
    given = dict(OLDER[form])
    if isinstance(given["target_modules"], list):
        names = [n for n in given["target_modules"] if n != "experts"]
        given["target_modules"] = names + EXPERTS[family]
    config = made.peft.LoraConfig(r=3, lora_alpha=5, **given)
    made.older(base, config, tmp_path / "adapter", tmp_path / "merged")
    found, _ = answers(base, tmp_path / "adapter", tmp_path)
    theirs = helpers.hf_logits(helpers.load(tmp_path / "merged"), IDS)
    helpers.assert_close(found, theirs)
    if form == "each expert":  # PEFT has a rule of its own for these in transformers 5
        newer = made.peft.PeftModel.from_pretrained(helpers.load(base), tmp_path / "adapter")
        helpers.assert_close(found, helpers.hf_logits(newer.eval(), IDS))


@pytest.mark.filterwarnings("ignore")
def test_stacks_of_granite_by_the_names_of_transformers_4(tmp_path: Path) -> None:
    base = helpers.save(families.random("granitemoe", 3), tmp_path / "base")
    config = made.peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["router.layer", "q_proj"],
        target_parameters=["input_linear.weight", "output_linear.weight"],
        rank_pattern={"output_linear.weight": 2},
    )
    made.older(base, config, tmp_path / "adapter", tmp_path / "merged")
    found, _ = answers(base, tmp_path / "adapter", tmp_path)
    helpers.assert_close(found, helpers.hf_logits(helpers.load(tmp_path / "merged"), IDS))


@pytest.mark.filterwarnings("ignore")
def test_biases_of_adapters(tmp_path: Path) -> None:
    """They go to biases that the base has; without one nothing can hold them."""
    attention = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]}
    config = made.peft.LoraConfig(lora_bias=True, **attention)
    model = families.random("qwen3_moe", 3, attention_bias=True)
    base = helpers.save(model, tmp_path / "base")
    theirs = made.adapter(model, config, tmp_path / "adapter")
    found, _ = answers(base, tmp_path / "adapter", tmp_path)
    helpers.assert_close(found, helpers.hf_logits(theirs, IDS))
    trained = made.peft.LoraConfig(bias="all", **attention)
    theirs = made.adapter(model, trained, tmp_path / "trained")
    found, _ = answers(base, tmp_path / "trained", tmp_path)
    helpers.assert_close(found, helpers.hf_logits(theirs, IDS))

    model = families.random("qwen3_moe", 3)
    base = helpers.save(model, tmp_path / "without")
    made.adapter(model, config, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"'lora_bias' is true, .* does not have"):
        answers(base, tmp_path / "other", tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore")
def test_types_of_sixteen_bits(dtype: str, tmp_path: Path) -> None:
    """A merge is rounded once, to the store's type; a store of float32 rounds nothing."""
    import torch

    model = families.random("mixtral", 3).to(getattr(torch, dtype))
    base = helpers.save(model, tmp_path / "base")
    config = made.peft.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=FUSED, modules_to_save=["lm_head"]
    )
    made.adapter(model, config, tmp_path / "adapter", size=0.1)
    store = build_store(
        tmp_path / "store", {"b": base, "t": tmp_path / "adapter"}, slots="all", bases={"t": base}
    )
    assert store.dtype == dtype
    wide = build_store(
        tmp_path / "wide",
        {"b": base, "t": tmp_path / "adapter"},
        slots="all",
        bases={"t": base},
        dtype="float32",
    )
    theirs = made.peft.PeftModel.from_pretrained(
        helpers.load(base), tmp_path / "adapter", autocast_adapter_dtype=True
    ).eval()
    with load_engine(wide.path, dtype="float32") as engine:
        helpers.assert_close(engine.logits("t", IDS), helpers.hf_logits(theirs, IDS))
    for name, ref in ((n, wide.ref("t", n)) for n in wide.tenant("t").tensors):
        rounded = ref.read().astype(store.ref("t", name).read().dtype)
        np.testing.assert_array_equal(rounded, store.ref("t", name).read(), err_msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_switch_transformers(tmp_path: Path) -> None:
    """As served by the other engine, with residuals."""
    model = switch_models.random_switch(1)
    base = helpers.save(model, tmp_path / "base")
    config = made.peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=3, target_modules=["q", "wi", "wo", "classifier"]
    )
    theirs = made.merged(made.adapter(model, config, tmp_path / "adapter"))
    store = build_store(
        tmp_path / "store", {"b": base, "t": tmp_path / "adapter"}, bases={"t": base}
    )
    assert len(store.plan.residuals) == store.experts.num_positions
    with load_engine(store.path, dtype="float32") as engine:
        found = engine.logits("t", IDS, ANSWERS)
    helpers.assert_close(found, switch_models.hf_logits(theirs, IDS, ANSWERS))
