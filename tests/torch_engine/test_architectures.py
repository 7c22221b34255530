"""Architectures that differ in what the maths depends on, against Hugging Face models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from common import EngineError, load_engine
from tests import helpers
from tests.helpers import assert_close, hf_greedy, hf_logits, rest_slow
from tests.torch_engine.comparison import NEW, compare
from torch_engine.experts.grouped_product import grouped_mm_fits

# Architectures that differ from the family of the fixtures in what the maths depends on.
SHAPES: dict[str, dict[str, Any]] = {
    "three experts, top-1": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "five experts, top-3": {
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
    },
    "sixteen experts": {"num_local_experts": 16},
    "all experts picked": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "odd sizes": {
        "hidden_size": 20,
        "intermediate_size": 27,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
    "head size of its own": {"head_dim": 16},
    "inner size no multiple of a block": {"intermediate_size": 48},
    "no grouped queries": {"num_key_value_heads": 4},
    "one layer": {"num_hidden_layers": 1, "vocab_size": 33},
    "tied head": {"tie_word_embeddings": True},
    "window shorter than the prompt": {"sliding_window": 5},
    "window longer than the prompt": {"sliding_window": 40},
    "gelu": {"hidden_act": "gelu"},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    # transformers needs head_dim spelled out here.
    "yarn rope": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        },
    },
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("shape", rest_slow(SHAPES, 4))
def test_other_architectures_equal_hugging_face(shape: str, tmp_path: Path) -> None:
    base = helpers.random_mixtral(3, **SHAPES[shape])
    models = [base, helpers.tuned(base, 4)]
    paths = {n: helpers.save(m, tmp_path / n) for n, m in zip(("a", "b"), models, strict=True)}
    store = helpers.build_round_robin(tmp_path / "all", paths, slots="all")
    with load_engine(store) as engine:
        for name, model in zip(paths, models, strict=True):
            compare(engine, name, model)
    store = helpers.build_round_robin(tmp_path / "shared", paths)
    with load_engine(store) as engine:
        for i, name in enumerate(paths):
            compare(engine, name, helpers.oracle(models, i, store.plan))


@pytest.mark.parametrize("shape", rest_slow(SHAPES, 2))
def test_every_way_to_multiply_equals_hugging_face(shape: str, tmp_path: Path) -> None:
    """What a processor without our kernels does, and what CUDA does, on every architecture; experts
    miss."""
    base = helpers.random_mixtral(3, **SHAPES[shape])
    models = [base, helpers.tuned(base, 4)]
    paths = {n: helpers.save(m, tmp_path / n) for n, m in zip(("a", "b"), models, strict=True)}
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=2)
    model = helpers.oracle(models, 1, store.plan)
    rows = helpers.prompts(1, (11, 4), model.config.vocab_size)
    expected = [hf_logits(model, [row])[0] for row in rows]
    greedy = [hf_greedy(model, row, 10) for row in rows]
    spec = store.experts
    ways: list[dict[str, Any]] = [{"products": "plain"}]
    if grouped_mm_fits(
        spec.hidden_size, spec.intermediate_size, torch.float32, torch.device("cpu")
    ):
        ways.append({"products": "plain", "experts": "grouped"})
    else:
        with pytest.raises(
            EngineError,
            match=r"experts='grouped' does not take torch\.float32 with sizes .*use auto",
        ):
            load_engine(store, experts="grouped")
    for way in ways:
        with load_engine(store, spare_slots=1, **way) as engine:
            found = engine.logits("b", rows)
            for i, row in enumerate(rows):
                assert_close(found[i, : len(row)], expected[i], what=f"{way}, {len(row)} tokens")
            answers = engine.generate_batch([("b", row) for row in rows], NEW)
            assert [list(a.token_ids) for a in answers] == greedy, way


def random_architecture(rng: random.Random) -> dict[str, Any]:
    heads, experts = rng.choice([2, 3, 4, 6]), rng.choice([2, 3, 4, 5, 8, 16])
    return {
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "hidden_size": heads * rng.choice([4, 6, 8, 10]),
        "intermediate_size": rng.choice([8, 24, 30, 41, 64]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([h for h in (1, 2, 3, 4, 6) if heads % h == 0]),
        "head_dim": rng.choice([None, 4, 16]),
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(3, experts)),
        "vocab_size": rng.choice([40, 77, 96]),
        "sliding_window": rng.choice([None, None, 3, 9, 64]),
        "tie_word_embeddings": rng.random() < 0.3,
        "rms_norm_eps": rng.choice([1e-5, 1e-2]),
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([100.0, 1e4, 1e6])},
    }


@pytest.mark.parametrize("seed", rest_slow(range(8)))
def test_any_mixture_of_all_that_may_vary(seed: int, tmp_path: Path) -> None:
    """Sizes, layouts on disk, number of tenants, slots and options of the engine, drawn at
    random."""
    rng = random.Random(seed)
    base = helpers.random_mixtral(seed, **random_architecture(rng))
    models = [base, *(helpers.tuned(base, i) for i in range(rng.randrange(4)))]
    layouts: list[dict[str, Any]] = [
        {},
        {"save_original_format": False},
        {"max_shard_size": "20KB"},
    ]
    paths = {
        f"t{i}": helpers.save(m, tmp_path / f"t{i}", **rng.choice(layouts))
        for i, m in enumerate(models)
    }
    positions = base.config.num_hidden_layers * base.config.num_local_experts
    store = helpers.build_round_robin(
        tmp_path / "store", paths, slots=rng.choice(["all", None, rng.randint(0, positions)])
    )
    options = {
        "products": rng.choice(["auto", "plain"]),
        "spare_slots": rng.choice([1, 2, 16]),
        "ready_tenants": rng.choice([None, 1]),
        "max_batch_size": rng.choice([1, 3, 32]),
    }
    requests = [
        (rng.randrange(len(models)), row)
        for row in helpers.prompts(
            seed, [rng.randint(1, 30) for _ in range(6)], base.config.vocab_size
        )
    ]
    oracles = [helpers.oracle(models, i, store.plan) for i in range(len(models))]
    with load_engine(store, **options) as engine:
        answers = engine.generate_batch([(f"t{i}", row) for i, row in requests], NEW)
        for (index, row), answer in zip(requests, answers, strict=True):
            assert_close(
                engine.logits(f"t{index}", [row]),
                hf_logits(oracles[index], [row]),
                what=str(options),
            )
            assert list(answer.token_ids) == hf_greedy(oracles[index], row, NEW.max_new_tokens), (
                options
            )


@pytest.mark.parametrize(
    "scaling", [None, {"type": "linear", "factor": 4.0}], ids=["theta", "theta and scaling"]
)
def test_older_configs_equal_hugging_face(scaling: Any, tmp_path: Path) -> None:
    path = helpers.save(helpers.random_mixtral(0), tmp_path / "old")
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (path / "config.json").write_text(
        json.dumps(config | {"rope_theta": 50.0, "rope_scaling": scaling})
    )
    model = helpers.load(path)
    assert model.config.rope_parameters["rope_theta"] == 50.0
    with load_engine(helpers.build_round_robin(tmp_path / "store", {"old": path})) as engine:
        compare(engine, "old", model)
