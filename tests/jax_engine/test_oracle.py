"""Logits and tokens of the JAX engine against Hugging Face's Switch Transformer in torch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import Engine, SamplingParams, load_engine
from tests.helpers import (
    adapted,
    assert_close,
    build_round_robin,
    padded,
    prompts,
    rest_slow,
    shared_path,
)
from tests.jax_engine.conftest import SwitchFamily, save_family
from tests.switch_models import (
    Model,
    hf_greedy,
    hf_logits,
    oracle,
    random_switch,
    tuned,
    with_capacity,
)

# Our own kernels where the machine has any, and XLA's products.
EVERY_WAY: list[Any] = rest_slow([{}, {"products": "plain"}])

SHAPES: dict[str, dict[str, Any]] = {
    "gated": {"gated": True},
    "uneven": {"num_layers": 4, "num_decoder_layers": 3, "num_sparse_encoder_layers": 2},
    "all sparse": {
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 3,
    },
    "sparse encoder": {
        "num_decoder_layers": 1,
        "num_sparse_decoder_layers": 0,
        "decoder_sparse_step": 0,
    },
    "untied": {"tie_word_embeddings": False},
    "router bias": {"router_bias": True},
    "gelu": {"dense_act_fn": "gelu"},
    "odd sizes": {
        "d_model": 40,
        "d_kv": 5,
        "d_ff": 70,
        "num_heads": 3,
        "vocab_size": 101,
        "num_experts": 7,
    },
    "sixteen experts": {"num_experts": 16},
    "many buckets": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "bfloat16 router": {"router_dtype": "bfloat16"},
}


def load(store: Any, **options: Any) -> Engine:
    """An engine, or a skip where our own kernels cannot be had."""
    if options.get("products") == "native":
        from jax_engine import native

        if native.load() is None:
            pytest.skip("no kernels of our own here: see native.load for what they need")
    return load_engine(store, **options)


def check(engine: Engine, name: str, model: Model, seed: int = 0, vocab_size: int = 96) -> None:
    """Logits of padded rows and greedy tokens of single ones."""
    rows = prompts(seed, [9, 4, 17], vocab_size)
    answers = np.array([[0, *row] for row in prompts(seed + 1, [6, 6, 6], vocab_size)])
    ids, mask = padded(rows)
    assert_close(engine.logits(name, ids, answers, mask), hf_logits(model, ids, answers, mask))
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    for row, answer in zip(
        rows, engine.generate_batch([(name, r) for r in rows], params), strict=True
    ):
        assert list(answer.token_ids) == hf_greedy(model, row, 8)


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("shape", rest_slow(SHAPES))
def test_architectures_equal_hugging_face(
    shape: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = random_switch(1, **SHAPES[shape])
    family = save_family(tmp_path, [model])
    with load(build_round_robin(tmp_path / "store", family.paths), **options) as engine:
        check(engine, "base", model, vocab_size=model.config.vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", rest_slow(["hf", "tenant1", "tenant2", "t5x/checkpoint_1000"]))
def test_shared_fixtures(kind: str, tmp_path: Path) -> None:
    path = shared_path(f"fixtures/switch_tiny/{kind}")
    reference = np.load(shared_path("fixtures/switch_tiny/reference.npz"))
    prefix = f"{kind}_" if kind.startswith("tenant") else ""
    # T5X keeps no config: the one number that the shapes do not tell lies beside it, as users put
    # it there.
    config = shared_path("fixtures/switch_tiny/hf/config.json") if kind.startswith("t5x") else None
    store = build_round_robin(
        tmp_path / "store", {"it": path}, slots="all", configs={"it": config} if config else None
    )
    inputs = [reference[k] for k in ("input_ids", "decoder_input_ids", "attention_mask")]
    with load_engine(store) as engine:
        assert_close(engine.logits("it", *inputs), reference[f"{prefix}logits"])
        rows = [
            ids[mask.astype(bool)].tolist() for ids, mask in zip(inputs[0], inputs[2], strict=True)
        ]
        answers = engine.generate_batch(
            [("it", r) for r in rows], SamplingParams(max_new_tokens=12)
        )
        assert [list(a.token_ids) for a in answers] == reference[f"{prefix}greedy_ids"][
            :, 1:
        ].tolist()
    if not prefix:
        capacity = int(reference["small_expert_capacity"])
        with load_engine(store, expert_capacity=capacity) as engine:
            assert_close(engine.logits("it", *inputs), reference["logits_small_capacity"])


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("slots", rest_slow([3, None, 0, 9, "all"]))
def test_shared_experts_equal_the_oracle(
    switch_family: SwitchFamily, tmp_path: Path, slots: Any, options: dict[str, Any]
) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=slots)
    with load(store, **options) as engine:
        for i, name in enumerate(switch_family.paths):
            check(engine, name, oracle(switch_family.models, i, store.plan), seed=i)
        stats = engine.stats()
        assert (stats["misses"] > 0) == (slots in (0, 3, 9))
        assert stats["spare_filled"] <= stats["spare_slots"]


def test_one_spare_slot_is_enough(switch_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=2)
    with load_engine(store, spare_slots=1) as engine:
        check(engine, "ana", oracle(switch_family.models, 1, store.plan))
        stats = engine.stats()
        assert stats["spare_filled"] == 1 and stats["fetches"] > 1
        assert stats["fetched_bytes"] > stats["fetches"] * store.copy_bytes * 0.99


@pytest.mark.parametrize("capacity", rest_slow([1, 3, "config"]))
def test_capacity_drops_the_tokens_that_hugging_face_drops(capacity: Any, tmp_path: Path) -> None:
    model = random_switch(3, expert_capacity=2)
    family = save_family(tmp_path, [model])
    with load_engine(
        build_round_robin(tmp_path / "store", family.paths), expert_capacity=capacity
    ) as engine:
        limited = with_capacity(model, 2 if capacity == "config" else capacity)
        rows, answers = np.array(prompts(0, [12, 12])), np.array(prompts(1, [7, 7]))
        assert_close(engine.logits("base", rows, answers), hf_logits(limited, rows, answers))
        unlimited = hf_logits(with_capacity(model, 4096), rows, answers)
        assert (
            np.abs(engine.logits("base", rows, answers) - unlimited).max() > 1e-2
        )  # some were dropped


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_switching(switch_family: SwitchFamily, tmp_path: Path, seed: int) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=(None, 9, "all")[seed])
    models = [oracle(switch_family.models, i, store.plan) for i in range(3)]
    row, answer = prompts(5, [11])[0], [0, 5, 6, 7]
    expected = [hf_logits(m, [row], [answer]) for m in models]
    rng = random.Random(seed)
    with load_engine(store, ready_tenants=(None, 1, 2)[seed]) as engine:
        for _ in range(12):
            i = rng.randrange(3)
            assert_close(engine.logits(engine.tenants[i], [row], [answer]), expected[i])
            assert len(engine.stats()["ready_tenants"]) <= (3, 1, 2)[seed]


@pytest.mark.slow
@pytest.mark.parametrize("max_batch_size", [1, 3, 32])
def test_mixed_tenants_in_one_call(
    switch_family: SwitchFamily, tmp_path: Path, max_batch_size: int
) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=12)
    models = [oracle(switch_family.models, i, store.plan) for i in range(3)]
    rows = prompts(7, [5, 16, 3, 33, 8, 12])
    with load_engine(store, max_batch_size=max_batch_size) as engine:
        requests = [(engine.tenants[i % 3], row) for i, row in enumerate(rows)]
        params = [SamplingParams(max_new_tokens=3 + i, ignore_eos=True) for i in range(len(rows))]
        for i, answer in enumerate(engine.generate_batch(requests, params)):
            assert answer.tenant == requests[i][0]
            assert list(answer.token_ids) == hf_greedy(models[i % 3], rows[i], 3 + i)


@pytest.mark.parametrize(
    "options", [*EVERY_WAY, pytest.param({"ready_tenants": 1}, marks=pytest.mark.slow)], ids=str
)
def test_what_tenants_have_equal_is_held_once(tmp_path: Path, options: dict[str, Any]) -> None:
    base = random_switch(0)
    models = [
        base,
        *(
            adapted(base, tuned(base, i), [part])
            for i, part in ((1, "SelfAttention.q"), (2, "EncDecAtt"))
        ),
    ]
    store = build_round_robin(tmp_path / "store", save_family(tmp_path, models).paths, slots=6)
    oracles = [oracle(models, i, store.plan) for i in range(3)]
    rows = prompts(7, [5, 16, 3, 8, 12])
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with load(store, **options) as engine:
        for i, name in enumerate(engine.tenants):
            check(engine, name, oracles[i])
        requests = [(engine.tenants[i % 3], row) for i, row in enumerate(rows)]
        for i, answer in enumerate(engine.generate_batch(requests, params)):
            assert list(answer.token_ids) == hf_greedy(oracles[i % 3], rows[i], 8)
        stats = engine.stats()
    with load(build_round_robin(tmp_path / "one", {"base": tmp_path / "base"}), **options) as one:
        whole = one.stats()["non_expert_bytes"]
    if "ready_tenants" in options:
        assert stats["reconfigurations"] >= 3
        assert stats["non_expert_bytes"] == whole
        assert stats["reconfigured_bytes"] < 0.4 * whole * stats["reconfigurations"]
    else:
        assert whole < stats["non_expert_bytes"] < 1.6 * whole  # 3 times, were nothing equal


@pytest.mark.slow
def test_hits_and_misses_are_counted_for_each_request(
    switch_family: SwitchFamily, tmp_path: Path
) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=9)
    rows = prompts(0, [6, 13, 2])
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    with load_engine(store) as engine:
        alone = [engine.generate("bob", r, params).timings for r in rows]
        together = [a.timings for a in engine.generate_batch([("bob", r) for r in rows], params)]
        assert [(t.hits, t.misses) for t in alone] == [(t.hits, t.misses) for t in together]
        for row, t in zip(rows, alone, strict=True):
            assert t.hits + t.misses == 2 * len(row) + 2 * 5
        assert sum(t.misses for t in alone) > 0
        stats = engine.stats()
        assert stats["misses"] == 2 * sum(t.misses for t in alone)
        assert stats["hits"] == 2 * sum(t.hits for t in alone)


@pytest.mark.slow
def test_answers_longer_than_the_first_cache(switch_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths)
    row = prompts(0, [70])[0]
    with load_engine(store) as engine:
        answer = engine.generate("ana", row, SamplingParams(max_new_tokens=80, ignore_eos=True))
        assert list(answer.token_ids) == hf_greedy(
            oracle(switch_family.models, 1, store.plan), row, 80
        )


@pytest.mark.slow
def test_end_of_sequence_ends_a_row_and_others_go_on(
    switch_family: SwitchFamily, tmp_path: Path
) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths)
    model = oracle(switch_family.models, 0, store.plan)
    rows = prompts(3, [4, 9, 6, 7, 5])
    free = [hf_greedy(model, r, 24) for r in rows]
    with load_engine(store) as engine:
        # Each row ends at a token of its own answer, at another step.
        params = [
            SamplingParams(max_new_tokens=24, ignore_eos=True, stop_token_ids=[tokens[2 + 4 * i]])
            for i, tokens in enumerate(free)
        ]
        answers = engine.generate_batch([("base", r) for r in rows], params)
    for answer, tokens, p in zip(answers, free, params, strict=True):
        (stop,) = p.stop_token_ids or ()
        assert (
            list(answer.token_ids) == tokens[: tokens.index(stop) + 1]
            and answer.finish_reason == "stop"
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path, options: dict[str, Any]) -> None:
    """On a CPU: what Hugging Face gives in float32 from weights rounded to bfloat16."""
    model = random_switch(4).to(torch.bfloat16)
    family = save_family(tmp_path, [model])
    with load(build_round_robin(tmp_path / "store", family.paths), **options) as engine:
        assert engine.stats()["dtype"] == "bfloat16"
        check(engine, "base", model.float())


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_bfloat16_on_request(tmp_path: Path, options: dict[str, Any]) -> None:
    model = random_switch(4)
    family = save_family(tmp_path, [model])
    rounded = random_switch(4)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and "router" not in name and "relative" not in name:
                parameter.copy_(parameter.to(torch.bfloat16))
    with load(
        build_round_robin(tmp_path / "store", family.paths), dtype="bfloat16", **options
    ) as engine:
        check(engine, "base", rounded)


def test_sequences_longer_than_any_bucket_distance(tmp_path: Path) -> None:
    model = random_switch(5, relative_attention_num_buckets=32, relative_attention_max_distance=128)
    family = save_family(tmp_path, [model])
    with load_engine(build_round_robin(tmp_path / "store", family.paths)) as engine:
        row, answer = prompts(0, [300])[0], [0, *prompts(1, [150])[0]]
        assert_close(engine.logits("base", [row], [answer]), hf_logits(model, [row], [answer]))


@pytest.mark.slow
def test_tenants_may_differ_in_all_but_their_experts(tmp_path: Path) -> None:
    """Heads, depth of dense layers' weights, buckets, head and vocabulary are a tenant's own."""
    changes: list[dict[str, Any]] = [
        {},
        {"num_heads": 2, "d_kv": 12, "vocab_size": 120},
        {"tie_word_embeddings": False, "relative_attention_num_buckets": 12, "router_bias": True},
    ]
    models = [random_switch(i, **c) for i, c in enumerate(changes)]
    family = save_family(tmp_path, models)
    store = build_round_robin(tmp_path / "store", family.paths)
    with load_engine(store) as engine:
        for i, name in enumerate(family.paths):
            check(engine, name, oracle(models, i, store.plan))


def test_export_gives_what_is_served(switch_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", switch_family.paths, slots=9)
    store.export("bob", tmp_path / "bob")
    exported = Model.from_pretrained(tmp_path / "bob").eval()
    expected = oracle(switch_family.models, 2, store.plan)
    for (name, ours), theirs in zip(
        exported.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
