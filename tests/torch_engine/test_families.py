"""Every family of decoders against transformers: models of odd sizes, each switch at least once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import MoetelError, SamplingParams, build_store, load_engine
from common.build.build import remove_tenant
from common.build.examples import CalibrationSet
from common.build.extend import extend_store
from common.checkpoints import open_checkpoint
from common.families import FAMILIES, Decoder
from common.plan.residual import LOW_RANK, SIGN, Part
from common.store.change import set_plan
from common.store.profiles import load_profile
from tests import helpers
from tests.families import SIZES, random, tenants
from tests.helpers import TOLERANCE, assert_close, hf_greedy, hf_logits, rest_slow

NEW = SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=0)

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
YARN |= {"original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}

# The first of each family, and the one in the middle, run by default.
MIXTRAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 4, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 3},
}
QWEN3: dict[str, dict[str, Any]] = {
    "dense layer by list, renormalised": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "plain": {},
    "dense layers by step": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "both, bias": {
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "num_hidden_layers": 4,
        "attention_bias": True,
    },
    "window, bias, sparse last": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "attention_bias": True,
        "mlp_only_layers": [0, 1],
    },
    "window not in use": {"use_sliding_window": False, "sliding_window": 4},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN},
    "linear": {"rope_parameters": LINEAR, "num_key_value_heads": 3},
    "sizes of a block": {"hidden_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 4},
    "gelu": {"hidden_act": "gelu", "mlp_only_layers": [0]},
    "all experts picked": {"num_experts_per_tok": 5},
}
OLMOE: dict[str, dict[str, Any]] = {
    "clip": {"clip_qkv": 0.6},
    "plain": {},
    "renormalised, bias, tied": {
        "norm_topk_prob": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "clip_qkv": 0.9,
    },
    "as many key heads": {"num_key_value_heads": None},
    "linear": {"rope_parameters": LINEAR},
    "sizes of a block": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4},
}
GRANITE: dict[str, dict[str, Any]] = {
    "plain": {},
    "its own head, bias": {"tie_word_embeddings": False, "attention_bias": True},
    "as many key heads, of the hidden size": {"num_key_value_heads": None, "head_dim": 12},
    "the class's multipliers": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "yarn": {"rope_parameters": YARN},
    "sizes of a block": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4},
}


def compare(engine: Any, models: Mapping[str, Any]) -> None:
    """Logits of several rows; greedy tokens of a batch of all tenants, and their probabilities."""
    rows = helpers.prompts(2, (7, 1, 19), 101)
    for name, model in models.items():
        ids, mask = helpers.padded(rows, "left")
        found = engine.logits(name, ids, attention_mask=mask)
        for i, row in enumerate(rows):
            expected = hf_logits(model, [row])[0]
            tolerance = max(TOLERANCE, 1e-5 * float(np.abs(expected).max()))
            assert_close(found[i][mask[i] == 1], expected, tolerance, f"{name}, {len(row)} tokens")
    requests = [(name, row) for row in rows for name in models]
    for (name, row), answer in zip(requests, engine.generate_batch(requests, NEW), strict=True):
        expected = hf_greedy(models[name], row, NEW.max_new_tokens)
        assert list(answer.token_ids) == expected, f"{name}, {len(row)} tokens"
        # What the cache holds may be wrong where greedy tokens are not.
        whole = torch.from_numpy(hf_logits(models[name], [[*row, *expected]])[0]).double()
        theirs = whole.log_softmax(-1)[len(row) - 1 : -1].gather(1, torch.tensor(expected)[:, None])
        ours = np.array([t.logprob for t in answer.logprobs])
        tolerance = max(TOLERANCE, 1e-5 * float(whole.abs().max()))
        assert_close(ours, theirs[:, 0].numpy(), tolerance, f"{name}, answer")


def check(family: str, changes: dict[str, Any], path: Path) -> None:
    """Nothing shared, then shared, then with misses."""
    models, paths = tenants(family, path, **changes)
    store = helpers.build_round_robin(path / "all", paths, slots="all")
    with load_engine(store) as engine:
        compare(engine, dict(zip(paths, models, strict=True)))
    for slots, options in ((None, {}), (3, {"spare_slots": 2, "ready_tenants": 1})):
        store = helpers.build_round_robin(path / "shared", paths, slots=slots)
        oracles = [helpers.oracle(models, i, store.plan) for i in range(2)]
        with load_engine(store, **options) as engine:
            compare(engine, dict(zip(paths, oracles, strict=True)))
            stats = engine.stats()
        assert (stats["misses"] > 0) == (slots == 3)


@pytest.mark.parametrize("case", MIXTRAL)
def test_mixtral(case: str, tmp_path: Path) -> None:
    check("mixtral", MIXTRAL[case], tmp_path)


@pytest.mark.parametrize("case", QWEN3)
def test_qwen3_moe(case: str, tmp_path: Path) -> None:
    check("qwen3_moe", QWEN3[case], tmp_path)


@pytest.mark.parametrize("case", OLMOE)
def test_olmoe(case: str, tmp_path: Path) -> None:
    check("olmoe", OLMOE[case], tmp_path)


@pytest.mark.parametrize("case", GRANITE)
def test_granitemoe(case: str, tmp_path: Path) -> None:
    check("granitemoe", GRANITE[case], tmp_path)


DECODERS = [name for name in SIZES if name != "mixtral"]
LAYERS = {"qwen3_moe": {"mlp_only_layers": [1]}, "olmoe": {"clip_qkv": 0.6}}


def test_every_family_of_decoders_is_here() -> None:
    shapes = {name: FAMILIES[name].parse_config({}, "test").shape for name in FAMILIES}
    assert set(SIZES) == {name for name, shape in shapes.items() if isinstance(shape, Decoder)}


@pytest.mark.parametrize("products", ["plain"])
@pytest.mark.parametrize("family", DECODERS)
def test_other_ways_to_multiply(family: str, products: str, tmp_path: Path) -> None:
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=4)
    oracles = [helpers.oracle(models, i, store.plan) for i in range(2)]
    with load_engine(store, products=products) as engine:
        compare(engine, dict(zip(paths, oracles, strict=True)))


@pytest.mark.parametrize("family", DECODERS)
def test_tenants_by_copy_and_grouped_products(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that CUDA takes, here on the host's memory."""
    from torch_engine.tenants.by_copy import TenantsByCopy

    monkeypatch.setattr(
        "torch_engine.backend.TenantsInPlace",
        lambda store, dtype, capacity, product: TenantsByCopy(
            store, dtype, torch.device("cpu"), capacity
        ),
    )
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=4)
    oracles = [helpers.oracle(models, i, store.plan) for i in range(2)]
    options = {"products": "plain", "experts": "grouped", "ready_tenants": 1, "spare_slots": 2}
    with load_engine(store, **options) as engine:
        compare(engine, dict(zip(paths, oracles, strict=True)))


@pytest.mark.parametrize("family", SIZES)
def test_both_layouts_on_disk_are_one_model(family: str, tmp_path: Path) -> None:
    model = random(family, 3, **LAYERS.get(family, {}))
    saved = {
        "original": {},
        "fused": {"save_original_format": False},
        "sharded": {"save_original_format": False, "max_shard_size": "20KB"},
    }
    paths = {n: helpers.save(model, tmp_path / n, **options) for n, options in saved.items()}
    names = [set(helpers.tensor_names(p)) for p in paths.values()]
    assert names[0] != names[1] == names[2]
    store = helpers.build_round_robin(tmp_path / "store", paths)
    first, *others = (dict(t.tensors) for t in store.manifest.tenants)
    assert all(other == first for other in others)
    with load_engine(store) as engine:
        compare(engine, {"fused": model})


@pytest.mark.parametrize("family", DECODERS)
def test_an_export_loads_in_transformers(family: str, tmp_path: Path) -> None:
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    store = helpers.build_round_robin(tmp_path / "store", paths)
    store.export("b", tmp_path / "export")
    assert store.verify() == []
    found = helpers.load(tmp_path / "export")
    expected = helpers.oracle(models, 1, store.plan)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    # And here again, in the layout that it was written in.
    assert open_checkpoint(tmp_path / "export").config.shape == store.config("b").shape


@pytest.mark.parametrize("family", DECODERS)
def test_residuals_and_merged_copies(family: str, tmp_path: Path) -> None:
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    store = helpers.build_round_robin(tmp_path / "store", paths)
    plan, means = helpers.with_merged(store, range(0, store.plan.num_slots, 2))
    parts = [Part("gate", SIGN, 1, 4), Part("up", LOW_RANK, 4, 3), Part("down", LOW_RANK, 16, 2)]
    plan, records = helpers.with_residuals(
        plan, dict(store.experts.projections), lambda t, _l, e: parts if (t + e) % 2 else parts[:1]
    )
    store = set_plan(tmp_path / "store", plan, merged=means, records=records)
    oracles = {n: helpers.oracle_of_store(store, models, i) for i, n in enumerate(store.tenants)}
    with load_engine(store) as engine:
        compare(engine, oracles)
    store.export("b", tmp_path / "export")
    rows = helpers.prompts(0, [11], 101)
    exported = hf_logits(helpers.load(tmp_path / "export"), rows)
    assert_close(exported, hf_logits(oracles["b"], rows))


@pytest.mark.parametrize("family", DECODERS)
def test_tenants_come_and_go(family: str, tmp_path: Path) -> None:
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    helpers.build_round_robin(tmp_path / "store", {"a": paths["a"]})
    store = extend_store(tmp_path / "store", "b", paths["b"])
    with load_engine(store) as engine:
        compare(engine, {n: helpers.oracle_of_store(store, models, i) for i, n in enumerate("ab")})
    store = remove_tenant(tmp_path / "store", "a")
    with load_engine(store) as engine:
        compare(engine, {"b": helpers.oracle_of_store(store, models[1:], 0)})


@torch.inference_mode()
def picked(model: Any, rows: list[list[int]]) -> np.ndarray:
    """int64 [sparse layers, experts], how often transformers' routers pick each expert."""
    modules = helpers.expert_modules(model)
    counts = np.zeros((len(modules), 5), dtype=np.int64)

    def count(layer: int) -> Any:
        def hook(module: Any, given: Any) -> None:
            np.add.at(counts[layer], given[1].reshape(-1).numpy(), 1)

        return hook

    hooks = [m.register_forward_pre_hook(count(n)) for n, m in enumerate(modules)]
    for row in rows:
        model(torch.tensor([row]))
    for h in hooks:
        h.remove()
    return counts


@pytest.mark.parametrize("family", DECODERS)
def test_calibrated_plans_with_residuals(family: str, tmp_path: Path) -> None:
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    rows = helpers.prompts(0, (20, 9, 14), 101)
    sets = {name: CalibrationSet.texts(rows) for name in paths}
    store = build_store(tmp_path / "store", paths, policy="residual", extra=0.4, calibration=sets)
    for name, model in zip(paths, models, strict=True):
        profile = load_profile(store, name)
        assert profile is not None
        np.testing.assert_array_equal(profile.counts, picked(model, rows))
        assert (profile.sensitivity > 0).all()
    assert store.plan.residuals
    oracles = {n: helpers.oracle_of_store(store, models, i) for i, n in enumerate(paths)}
    with load_engine(store) as engine:
        compare(engine, oracles)


# What belongs to a tenant alone may differ: all that experts do not see.
OWN: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"mlp_only_layers": [1], "norm_topk_prob": True},
        {"mlp_only_layers": [1], "intermediate_size": 44, "attention_bias": True},
        {
            "mlp_only_layers": [1],
            "head_dim": 6,
            "num_key_value_heads": 3,
            "use_sliding_window": True,
            "sliding_window": 3,
            "tie_word_embeddings": True,
        },
    ],
    "olmoe": [{}, {"clip_qkv": 0.5, "norm_topk_prob": True}, {"num_key_value_heads": 3}],
    "granitemoe": [
        {},
        {"residual_multiplier": 1.0, "embedding_multiplier": 1.0, "tie_word_embeddings": False},
        {"attention_multiplier": 0.5, "logits_scaling": 3.0, "attention_bias": True},
    ],
}


@pytest.mark.parametrize("family", OWN)
def test_tenants_of_a_batch_may_differ_in_what_is_their_own(family: str, tmp_path: Path) -> None:
    models = [random(family, i, **changes) for i, changes in enumerate(OWN[family])]
    paths = {f"t{i}": helpers.save(m, tmp_path / f"t{i}") for i, m in enumerate(models)}
    store = helpers.build_round_robin(tmp_path / "store", paths)
    oracles = {n: helpers.oracle(models, i, store.plan) for i, n in enumerate(paths)}
    with load_engine(store) as engine:
        compare(engine, oracles)


def test_tenants_must_agree_in_their_layers(tmp_path: Path) -> None:
    """Sparse layers of one number, but other dense ones: no step could compute both."""
    few = random("qwen3_moe", 0, mlp_only_layers=[1])
    more = random("qwen3_moe", 1, mlp_only_layers=[1, 3], num_hidden_layers=4)
    other = random("qwen3_moe", 1, mlp_only_layers=[0])
    paths = {
        n: helpers.save(m, tmp_path / n)
        for n, m in (("few", few), ("more", more), ("other", other))
    }
    for name, what in (("more", "model_layers: 3 != 4"), ("other", "expert_layers: ")):
        pair = {n: paths[n] for n in ("few", name)}
        with pytest.raises(MoetelError, match=what):
            helpers.build_round_robin(tmp_path / "store", pair)


@pytest.mark.parametrize("family", rest_slow(DECODERS, 3))
def test_bfloat16_is_as_close_as_transformers_is(family: str, tmp_path: Path) -> None:
    model = random(family, 0, **LAYERS.get(family, {})).to(torch.bfloat16)
    path = helpers.save(model, tmp_path / "only")
    store = helpers.build_round_robin(tmp_path / "store", {"only": path})
    rows = helpers.prompts(0, [60], 101)
    expected, exact = hf_logits(model, rows), hf_logits(helpers.load(path), rows)
    for options in ({}, {"products": "plain"}):
        with load_engine(store, **options) as engine:
            found = engine.logits("only", rows)
        error, allowed = np.abs(found - exact).mean(), np.abs(expected - exact).mean()
        assert error <= 1.5 * allowed, (options, error, allowed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", SIZES)
def test_cuda_float32(family: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    models, paths = tenants(family, tmp_path, **LAYERS.get(family, {}))
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=4)
    oracles = [helpers.oracle(models, i, store.plan) for i in range(2)]
    with load_engine(store, device="cuda", ready_tenants=1) as engine:
        compare(engine, dict(zip(paths, oracles, strict=True)))
