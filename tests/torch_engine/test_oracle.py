"""The engine against Hugging Face models whose experts were replaced as the plan says."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import EngineError, SamplingParams, load_engine
from tests import helpers
from tests.conftest import Family
from tests.helpers import TOLERANCE, assert_close, hf_greedy, hf_logits, rest_slow
from torch_engine.experts.grouped_product import grouped_mm_fits
from torch_engine.tenants.by_copy import TenantsByCopy

NEW = SamplingParams(max_new_tokens=10, ignore_eos=True)

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

LENGTHS = (7, 1, 19, 12)


def compare(engine: Any, name: str, model: Any, seed: int = 0) -> None:
    """Logits of a padded batch on either side, and greedy tokens of a batch, against one Hugging
    Face model."""
    rows = helpers.prompts(seed, LENGTHS, model.config.vocab_size)
    expected = [hf_logits(model, [row])[0] for row in rows]
    for side in ("right", "left"):
        ids, mask = helpers.padded(rows, side)
        found = engine.logits(name, ids, attention_mask=mask)
        for i, row in enumerate(rows):
            # The fixtures' bound is absolute; these random models' logits may be many times as
            # large.
            tolerance = max(TOLERANCE, 1e-5 * float(np.abs(expected[i]).max()))
            assert_close(
                found[i][mask[i] == 1],
                expected[i],
                tolerance,
                f"{name}, {side} padding, {len(row)} tokens",
            )
            assert not found[i][mask[i] == 0].any()
    answers = engine.generate_batch([(name, row) for row in rows], NEW)
    for row, answer in zip(rows, answers, strict=True):
        assert list(answer.token_ids) == hf_greedy(model, row, NEW.max_new_tokens), (
            f"{name}, {len(row)} tokens"
        )


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


# What belongs to a tenant alone: everything that experts do not see.
OWN: dict[str, dict[str, Any]] = {
    "usual": {},
    "heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 40},
    "window": {"sliding_window": 4, "rms_norm_eps": 1e-3, "max_position_embeddings": 64},
    "tied": {
        "tie_word_embeddings": True,
        "vocab_size": 120,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3},
    },
}


@pytest.fixture
def unlike(tmp_path: Path) -> Family:
    """Four tenants that differ in all but their experts' shape, in one type or another."""
    models = [helpers.random_mixtral(i, **changes) for i, changes in enumerate(OWN.values())]
    return Family(
        {n: helpers.save(m, tmp_path / n) for n, m in zip(OWN, models, strict=True)}, models
    )


@pytest.mark.parametrize(
    "way", ["in place", "in place, one ready", "by copy", "by copy, one ready", "by copy, two"]
)
def test_tenants_may_differ_in_all_but_their_experts(
    unlike: Family, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`by copy` is the path that CUDA takes, here on the host's memory: one buffer serves tenants
    of any size."""
    if "copy" in way:
        monkeypatch.setattr(
            "torch_engine.backend.TenantsInPlace",
            lambda store, dtype, capacity, product: TenantsByCopy(
                store, dtype, torch.device("cpu"), capacity
            ),
        )
    capacity = 1 if "one" in way else 2 if "two" in way else None
    store = helpers.build_round_robin(tmp_path / "store", unlike.paths, slots=6)
    oracles = [helpers.oracle(unlike.models, i, store.plan) for i in range(4)]
    names = unlike.names
    rng = random.Random(0)
    with load_engine(store, ready_tenants=capacity) as engine:
        for index in [*range(4), *(rng.randrange(4) for _ in range(8))]:
            row = helpers.prompts(index, [13], oracles[index].config.vocab_size)[0]
            assert_close(
                engine.logits(names[index], [row]),
                hf_logits(oracles[index], [row]),
                what=names[index],
            )
        requests = [
            (i, helpers.prompts(n, [3 + n], oracles[i].config.vocab_size)[0])
            for n, i in enumerate([2, 0, 1, 3, 3, 1, 0, 2])
        ]
        answers = engine.generate_batch([(names[i], row) for i, row in requests], NEW)
        for (index, row), answer in zip(requests, answers, strict=True):
            assert list(answer.token_ids) == hf_greedy(oracles[index], row, NEW.max_new_tokens), (
                names[index]
            )
        assert (engine.stats()["reconfigured_bytes"] > 0) == ("copy" in way or capacity is not None)


@pytest.fixture
def adapted(tmp_path: Path) -> Family:
    """A base, two adapters of its attention, one of which moved the last norm as well, and one that
    moved all."""
    base = helpers.random_mixtral(0)
    other = helpers.tuned(base, 3)
    models = [
        base,
        helpers.adapted(base, helpers.tuned(base, 1), ["q_proj", "v_proj"]),
        helpers.adapted(base, helpers.tuned(base, 2), ["o_proj", "model.norm"]),
        other,
    ]
    names = ("base", "qv", "o", "other")
    return Family(
        {n: helpers.save(m, tmp_path / n) for n, m in zip(names, models, strict=True)}, models
    )


@pytest.mark.parametrize(
    "options", rest_slow([{}, {"products": "plain"}, {"ready_tenants": 2}], 2), ids=str
)
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "by copy"])
def test_what_tenants_have_equal_is_held_once(
    adapted: Family,
    tmp_path: Path,
    copies: bool,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if copies:
        monkeypatch.setattr(
            "torch_engine.backend.TenantsInPlace",
            lambda store, dtype, capacity, product: TenantsByCopy(
                store, dtype, torch.device("cpu"), capacity
            ),
        )
    # On the device all places are as large as the last tenant's, see below.
    count = 3 if copies else 4
    paths = {n: adapted.paths[n] for n in adapted.names[:count]}
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=6)
    oracles = [helpers.oracle(adapted.models[:count], i, store.plan) for i in range(count)]
    rows = helpers.prompts(0, [9, 4, 17, 6, 5, 12, 3, 8])
    whole = store.non_expert_bytes("base")
    with load_engine(store, **options) as engine:
        # All that the first three have of their own: matrices of attention in each of two layers.
        held, most = engine.stats()["non_expert_bytes"], 0.35 * whole
        if "ready_tenants" not in options:
            assert (count - 2) * whole < held < (count - 2) * whole + 3 * most
        requests = [(engine.tenants[i % count], row) for i, row in enumerate(rows)]
        for (name, row), answer in zip(requests, engine.generate_batch(requests, NEW), strict=True):
            assert list(answer.token_ids) == hf_greedy(
                oracles[engine.tenants.index(name)], row, NEW.max_new_tokens
            )
        for i, name in enumerate(engine.tenants):
            assert_close(
                engine.logits(name, [rows[i]]), hf_logits(oracles[i], [rows[i]]), what=name
            )
        if "ready_tenants" in options:
            before = engine.stats()
            for name in ("base", "qv", "o", "base"):
                engine.generate(name, rows[0], NEW)
            after = engine.stats()
            switches = after["reconfigurations"] - before["reconfigurations"]
            copied = after["reconfigured_bytes"] - before["reconfigured_bytes"]
            assert switches >= 3 and copied < most * switches


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "by copy"])
def test_what_tenants_had_equal_goes_with_the_last_of_them(
    adapted: Family, tmp_path: Path, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies:
        monkeypatch.setattr(
            "torch_engine.backend.TenantsInPlace",
            lambda store, dtype, capacity, product: TenantsByCopy(
                store, dtype, torch.device("cpu"), capacity
            ),
        )
    paths = adapted.paths
    four = helpers.build_round_robin(tmp_path / "four", paths)
    with load_engine(four) as engine:
        # A tenant without anything in common makes all places on the device as large as its own.
        assert (engine.stats()["non_expert_bytes"] < 3 * four.non_expert_bytes("base")) == (
            not copies
        )
    three = helpers.build_round_robin(
        tmp_path / "three", {n: paths[n] for n in ("base", "qv", "o")}
    )
    two = helpers.build_round_robin(tmp_path / "two", {n: paths[n] for n in ("other", "o")})
    row = helpers.prompts(1, [7])[0]
    with load_engine(three) as engine:
        few = engine.stats()["non_expert_bytes"]
        assert few < 2.05 * three.non_expert_bytes("base")
        for store in (two, three):
            engine.update(store)
            with load_engine(store) as fresh:
                for name in store.tenants:
                    assert_close(engine.logits(name, [row]), fresh.logits(name, [row]))
                # A tenant whose weights lie in its own buffer keeps them there when others that
                # have them come.
                held, expected = (e.stats()["non_expert_bytes"] for e in (engine, fresh))
                assert (
                    expected
                    <= held
                    <= (expected if not copies else expected + store.non_expert_bytes("o"))
                )


@pytest.mark.parametrize("products", ["auto", "plain"])
def test_a_window_slides_over_a_long_answer(tmp_path: Path, products: str) -> None:
    """Beyond the first room for keys and values, and beside a shorter row that ends early."""
    model = helpers.random_mixtral(2, sliding_window=7)
    rows = helpers.prompts(2, [20, 3])
    counts = (150, 40)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in counts]
    with load_engine(
        helpers.build_round_robin(
            tmp_path / "store", {"only": helpers.save(model, tmp_path / "only")}
        ),
        products=products,
    ) as engine:
        answers = engine.generate_batch([("only", row) for row in rows], params)
    for row, count, answer in zip(rows, counts, answers, strict=True):
        assert list(answer.token_ids) == hf_greedy(model, row, count)


@pytest.mark.parametrize("fixture", rest_slow(["base", "base_fused", "tenant1", "tenant2"], 2))
def test_shared_fixtures_nothing_shared(fixture: str, tmp_path: Path) -> None:
    root = helpers.shared_path("fixtures/mixtral_tiny")
    reference = np.load(root / "reference.npz")
    names = ("base", "base_fused", "tenant1", "tenant2")
    store = helpers.build_round_robin(tmp_path / "store", {n: root / n for n in names}, slots="all")
    ids, mask = reference["input_ids"], reference["attention_mask"]
    key = fixture.removesuffix("_fused")
    with load_engine(store) as engine:
        found = engine.logits(fixture, ids, attention_mask=mask)
        assert_close(found[mask == 1], reference[f"{key}_logits"][mask == 1])
        rows = [row[: m.sum()].tolist() for row, m in zip(ids, mask, strict=True)]
        answers = engine.generate_batch(
            [(fixture, row) for row in rows], SamplingParams(max_new_tokens=12)
        )
        assert [list(a.token_ids) for a in answers] == reference[f"{key}_greedy_ids"].tolist()


@pytest.mark.parametrize("slots", rest_slow([3, None, 0, 5, "all"]))
@pytest.mark.parametrize(
    "options",
    [{}, {"spare_slots": 1}, {"experts": "grouped", "spare_slots": 2}, {"products": "plain"}],
    ids=str,
)
def test_shared_experts_equal_the_oracle(
    family: Family, tmp_path: Path, slots: Any, options: dict[str, Any]
) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=slots)
    with load_engine(store, **options) as engine:
        for i, name in enumerate(family.names):
            compare(engine, name, helpers.oracle(family.models, i, store.plan), seed=i)
        stats = engine.stats()
    assert (stats["misses"] > 0) == (slots in (0, 3, 5))
    assert stats["fetches"] <= stats["misses"]
    assert stats["spare_filled"] <= stats["spare_slots"]


@pytest.mark.parametrize("seed", rest_slow(range(3)))
def test_any_order_of_switching(family: Family, tmp_path: Path, seed: int) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=4)
    oracles = [helpers.oracle(family.models, i, store.plan) for i in range(3)]
    rng = random.Random(seed)
    order = [rng.randrange(3) for _ in range(12)]
    row = helpers.prompts(seed, [9])[0]
    expected = [hf_logits(m, [row]) for m in oracles]
    for options in ({}, {"ready_tenants": 1}, {"ready_tenants": 2, "products": "plain"}):
        with load_engine(store, spare_slots=2, **options) as engine:
            for index in order:
                assert_close(engine.logits(family.names[index], [row]), expected[index])


@pytest.mark.parametrize(
    "options", [{}, {"ready_tenants": 1}, {"ready_tenants": 2}, {"experts": "grouped"}], ids=str
)
@pytest.mark.parametrize("max_batch_size", rest_slow([4, 1, 32]))
def test_mixed_tenants_in_one_batch(
    family: Family, tmp_path: Path, options: dict[str, Any], max_batch_size: int
) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=5)
    rng = random.Random(1)
    requests = [
        (rng.randrange(3), row) for row in helpers.prompts(7, [3, 11, 6, 6, 17, 1, 9, 4, 11])
    ]
    # Different lengths of answers, so that rows leave the batch at different times.
    params = [
        SamplingParams(max_new_tokens=3 + 2 * i, ignore_eos=True) for i in range(len(requests))
    ]
    with load_engine(store, max_batch_size=max_batch_size, **options) as engine:
        answers = engine.generate_batch([(family.names[i], row) for i, row in requests], params)
    oracles = [helpers.oracle(family.models, i, store.plan) for i in range(3)]
    for (index, row), answer, param in zip(requests, answers, params, strict=True):
        assert answer.tenant == family.names[index]
        assert list(answer.token_ids) == hf_greedy(oracles[index], row, param.max_new_tokens)
        assert answer.finish_reason == "length"


def test_hits_and_misses_are_counted_for_each_request(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=4)
    with load_engine(store, spare_slots=3) as engine:
        rows = helpers.prompts(0, [5, 9])
        alone = [
            engine.generate(n, row, NEW).timings
            for n, row in zip(("ana", "bob"), rows, strict=True)
        ]
        together = engine.generate_batch(list(zip(("ana", "bob"), rows, strict=True)), NEW)
        stats = engine.stats()
    for row, one, both in zip(rows, alone, together, strict=True):
        # Every token but the last new one is looked up in 2 layers for 2 experts.
        assert one.hits + one.misses == (len(row) + NEW.max_new_tokens - 1) * 4
        assert (one.hits, one.misses) == (both.timings.hits, both.timings.misses)
    assert stats["misses"] == 2 * sum(t.misses for t in alone) > 0
    assert stats["hits"] == 2 * sum(t.hits for t in alone) > 0


def test_answers_longer_than_the_first_cache(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    row = helpers.prompts(0, [30])[0]
    model = helpers.oracle(family.models, 1, store.plan)
    with load_engine(store) as engine:
        answer = engine.generate("ana", row, SamplingParams(max_new_tokens=200, ignore_eos=True))
        assert list(answer.token_ids) == hf_greedy(model, row, 200)
        # The context ends at 256: 226 new tokens, whatever was asked.
        answer = engine.generate("ana", row, SamplingParams(max_new_tokens=500, ignore_eos=True))
    assert len(answer.token_ids) == 226 and answer.finish_reason == "length"


def test_end_of_sequence_ends_a_row_and_others_go_on(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots="all")
    rows = helpers.prompts(5, [4, 8, 6])
    # Take as stop token one that greedy decoding is known to reach at different steps.
    full = [hf_greedy(family.models[0], row, 20) for row in rows]
    stop = full[0][5]
    with load_engine(store) as engine:
        answers = engine.generate_batch(
            [("base", row) for row in rows],
            SamplingParams(max_new_tokens=20, ignore_eos=True, stop_token_ids=[stop]),
        )
    for answer, tokens in zip(answers, full, strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else 20
        assert list(answer.token_ids) == tokens[:end]
        assert answer.finish_reason == ("stop" if stop in tokens else "length")


def test_bfloat16_is_close_to_hugging_face(tmp_path: Path) -> None:
    model = helpers.random_mixtral(0).to(torch.bfloat16)
    store = helpers.build_round_robin(
        tmp_path / "store", {"only": helpers.save(model, tmp_path / "only")}
    )
    assert store.dtype == "bfloat16"
    rows = helpers.prompts(0, [40])
    expected = hf_logits(model, rows)
    exact = hf_logits(helpers.load(tmp_path / "only"), rows)
    for options in ({}, {"products": "plain"}, {"experts": "grouped"}):
        with load_engine(store, **options) as engine:
            found = engine.logits("only", rows)
        # As close to exact arithmetic as Hugging Face's own bfloat16 is, with room for other
        # roundings.
        error, allowed = np.abs(found - exact).mean(), np.abs(expected - exact).mean()
        assert error <= 1.5 * allowed, (options, error, allowed)
    with load_engine(store, dtype="float32") as engine:
        assert_close(engine.logits("only", rows), exact)


@pytest.mark.parametrize("options", [{}, {"products": "plain"}, {"experts": "grouped"}], ids=str)
def test_bfloat16_picks_the_tokens_that_hugging_face_picks(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Wherever the choice is clearer than the rounding of Hugging Face's own bfloat16."""
    path = helpers.save(helpers.random_mixtral(1).to(torch.bfloat16), tmp_path / "only")
    model, exact_model = helpers.load(path, torch.bfloat16), helpers.load(path)
    (prompt,) = helpers.prompts(1, [8])
    row = prompt + hf_greedy(exact_model, prompt, 60)
    expected, exact = hf_logits(model, [row])[0], hf_logits(exact_model, [row])[0]
    best = np.sort(exact, axis=-1)
    clear = best[:, -1] - best[:, -2] > 3 * np.abs(expected - exact).max()
    assert clear.mean() > 0.5
    # The longest run of clear choices, to be decoded step by step.
    unclear = [6, *(7 + np.flatnonzero(~clear[7:-1])), len(row) - 1]
    start, count = max(
        ((int(a) + 1, int(b - a) - 1) for a, b in pairwise(unclear)), key=lambda run: run[1]
    )
    assert count >= 8
    with load_engine(
        helpers.build_round_robin(tmp_path / "store", {"only": path}), **options
    ) as engine:
        found = engine.logits("only", [row])[0]
        answer = engine.generate(
            "only", row[: start + 1], SamplingParams(max_new_tokens=count, ignore_eos=True)
        )
    assert (found.argmax(-1) == exact.argmax(-1))[clear].all()
    assert list(answer.token_ids) == row[start + 1 : start + 1 + count]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"ready_tenants": 1}, {"spare_slots": 1, "experts": "loop"}], ids=str
)
@pytest.mark.parametrize("slots", [3, None, "all"])
def test_cuda_float32(family: Family, tmp_path: Path, slots: Any, options: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=slots)
    with load_engine(store, device="cuda", **options) as engine:
        for i, name in enumerate([*family.names, *reversed(family.names)]):
            index = family.names.index(name)
            compare(engine, name, helpers.oracle(family.models, index, store.plan), seed=i)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("slots", [3, None])
def test_cuda_bfloat16_grouped(family: Family, tmp_path: Path, slots: Any) -> None:
    store = helpers.build_round_robin(
        tmp_path / "store", family.paths, slots=slots, dtype="bfloat16"
    )
    rows = helpers.prompts(0, [40])
    with load_engine(store, device="cpu", dtype="float32") as exact_engine:
        exact = {name: exact_engine.logits(name, rows) for name in family.names}
    with load_engine(
        store, device="cuda", experts="grouped", spare_slots=1, ready_tenants=1
    ) as engine:
        for name in family.names:
            error = np.abs(engine.logits(name, rows) - exact[name]).mean()
            assert error <= 0.05 * np.abs(exact[name]).mean()
