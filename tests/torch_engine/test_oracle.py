"""The engine against Hugging Face models whose experts were replaced as the plan says."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import SamplingParams, load_engine
from tests import helpers
from tests.conftest import Family
from tests.helpers import assert_close, hf_greedy, hf_logits, rest_slow
from tests.torch_engine.comparison import NEW, compare


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
