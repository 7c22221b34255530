"""Residuals and merged copies in the JAX engine, against Hugging Face's model with the weights that
the store serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from common import Engine, EngineError, SamplingParams, load_engine
from common.plan.residual import SIGN, Part, row_bytes
from jax_engine.experts import residuals as module
from tests.helpers import build_round_robin, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily, save_family
from tests.jax_engine.residual_plans import FORMS, all_of, mixed, served
from tests.jax_engine.test_oracle import EVERY_WAY, check, load
from tests.jax_engine.test_steps import backend_of, backend_rows, lowered_decode
from tests.switch_models import (
    hf_greedy,
    oracle_of_store,
    random_switch,
    tuned,
    with_residuals,
)

FREE = SamplingParams(max_new_tokens=5, ignore_eos=True)


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("form", rest_slow(FORMS))
def test_every_form_equals_hugging_face(
    tiny_family: SwitchFamily, tmp_path: Path, form: str, options: dict[str, Any]
) -> None:
    store = with_residuals(build_round_robin(tmp_path / "store", tiny_family.paths), all_of(form))
    with load(store, **options) as engine:
        check(engine, "ana", served(tiny_family, store)[1])


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("slots", rest_slow([5, None, "all"]))
def test_merged_copies_and_mixed_residuals_equal_hugging_face(
    tiny_family: SwitchFamily, tmp_path: Path, slots: Any, options: dict[str, Any]
) -> None:
    """Several parts a matrix, some projections alone, a tenant without any; with 5 slots, misses
    beside them."""
    store = with_residuals(
        build_round_robin(tmp_path / "store", tiny_family.paths, slots=slots),
        mixed,
        merged=(0, 2, 3),
    )
    assert store.plan.residuals
    with load(store, **options) as engine:
        for i, model in enumerate(served(tiny_family, store)):
            check(engine, engine.tenants[i], model, seed=i)
        assert (engine.stats()["misses"] > 0) == (slots == 5)


@pytest.mark.slow
def test_residuals_are_no_small_thing(tiny_family: SwitchFamily, tmp_path: Path) -> None:
    """What the tests above add moves the logits by far more than they allow."""
    store = with_residuals(build_round_robin(tmp_path / "store", tiny_family.paths), all_of("sign"))
    ids, answers = prompts(0, [9]), prompts(1, [6])
    plain = build_round_robin(tmp_path / "plain", tiny_family.paths)
    with load_engine(store) as engine, load_engine(plain) as without:
        difference = np.abs(
            engine.logits("ana", ids, answers) - without.logits("ana", ids, answers)
        )
        assert difference.max() > 1


@pytest.mark.slow
def test_merged_copies_alone(tiny_family: SwitchFamily, tmp_path: Path) -> None:
    store = with_residuals(
        build_round_robin(tmp_path / "store", tiny_family.paths), lambda *_: [], merged=range(8)
    )
    assert not store.plan.residuals
    with load_engine(store) as engine:
        for i, model in enumerate(served(tiny_family, store)):
            check(engine, engine.tenants[i], model, seed=i)
        assert backend_of(engine).loaded.ready.acquire(["ana"])[0]["ana"].residuals == ()


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize(
    "sizes",
    rest_slow(
        [
            {"gated": True},
            {
                "d_model": 40,
                "d_kv": 5,
                "d_ff": 70,
                "num_heads": 3,
                "vocab_size": 101,
                "num_experts": 7,
            },
        ]
    ),
    ids=["gated", "odd"],
)
def test_architectures(tmp_path: Path, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    base = random_switch(1, **sizes)
    family = save_family(tmp_path, [base, tuned(base, 1), tuned(base, 2)])
    store = with_residuals(
        build_round_robin(tmp_path / "store", family.paths),
        lambda t, n, e: mixed(t, n, e, "gated" in sizes),
        merged=(1,),
    )
    with load(store, **options) as engine:
        for i in (1, 2):
            check(
                engine,
                engine.tenants[i],
                served(family, store)[i],
                vocab_size=base.config.vocab_size,
            )


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_bfloat16_stores(tmp_path: Path, options: dict[str, Any]) -> None:
    base = random_switch(4).to(torch.bfloat16)
    family = save_family(tmp_path, [base, tuned(base, 1)])
    store = with_residuals(build_round_robin(tmp_path / "store", family.paths), mixed, merged=(1,))
    assert store.dtype == "bfloat16" and store.plan.residuals
    with load(store, **options) as engine:
        check(engine, "ana", oracle_of_store(family.models[1].float(), store, "ana"))


@pytest.mark.slow
@pytest.mark.skipif(
    len(jax.devices("cpu")) < 8, reason="needs 8 virtual CPU devices: see tests/conftest.py"
)
@pytest.mark.parametrize("slots", rest_slow([5, None]))
@pytest.mark.parametrize("mesh", rest_slow([(1, 3), (2, 4)]), ids=str)
def test_meshes(
    tiny_family: SwitchFamily, tmp_path: Path, mesh: tuple[int, int], slots: Any
) -> None:
    store = with_residuals(
        build_round_robin(tmp_path / "store", tiny_family.paths, slots=slots), mixed, merged=(0, 3)
    )
    with load_engine(store, mesh=mesh) as engine:
        for i in (1, 2):
            check(engine, engine.tenants[i], served(tiny_family, store)[i], seed=i)


# Memory, compilations, what a plan without residuals gets.


@pytest.mark.slow
@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_a_switch_compiles_and_copies_nothing(
    tiny_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    """The tenants have other kinds and ranks, and one has no residuals at all."""
    store = with_residuals(build_round_robin(tmp_path / "store", tiny_family.paths), mixed)
    with load_engine(store, products=products) as engine:
        backend, row = backend_of(engine), prompts(0, [9])[0]

        def places() -> set[int]:
            held = [
                tenant.residuals
                for tenant in backend.loaded.ready.acquire(engine.tenants)[0].values()
            ]
            return {
                layer.words.unsafe_buffer_pointer()
                for tenant in held
                for layer in tenant
                if layer is not None
            }

        engine.generate("base", row, FREE)
        before, where = engine.stats(), places()
        assert len(where) == 2  # one array for each sparse layer, whoever asks
        for name in ("ana", "bob", "base", "bob", "ana"):
            assert list(engine.generate(name, row, FREE).token_ids) == hf_greedy(
                served(tiny_family, store)[engine.tenants.index(name)], row, 5
            )
        after = engine.stats()
        assert after["compilations"] == before["compilations"] and after["reconfigured_bytes"] == 0
        assert places() == where


@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_bytes_are_counted_and_freed(
    tiny_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    store = build_round_robin(tmp_path / "store", tiny_family.paths)
    with load_engine(store, products=products) as engine:
        plain = engine.stats()
        assert plain["residual_bytes"] == 0
    store = with_residuals(store, mixed)
    with load_engine(store, products=products) as engine:
        stats, backend = engine.stats(), backend_of(engine)
        assert (stats["pool_bytes"], stats["non_expert_bytes"]) == (
            plain["pool_bytes"],
            plain["non_expert_bytes"],
        )
        more = stats["residual_bytes"] - store.residual_bytes
        if stats["products"] == "XLA":
            # XLA's products read in groups of rows, so there is room behind each of the two layers'
            # records.
            assert 0 < more <= 2 * module.LOW_RANK_ROWS * row_bytes(64, 16)
        else:
            shapes = dict(store.experts.projections)
            signs = [
                shapes[p.projection]
                for r in store.plan.residuals
                for p in r.parts
                if p.kind == SIGN
            ]
            assert more == sum(
                (-(-outputs // 64) * 64 - outputs) * inputs // 8 for outputs, inputs in signs
            )
    assert backend.loaded.residuals.device_bytes == 0


def lowered(engine: Engine) -> Any:
    """A decode step of the first tenant."""
    return lowered_decode(backend_of(engine), backend_rows(engine, [[5, 6, 7]]))[0]


@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_a_compiled_step_expands_no_residual(tmp_path: Path, products: str) -> None:
    """Its temporary memory stays below one copy's, and below all residuals expanded to a byte a
    weight."""
    model = random_switch(0, d_ff=512, d_model=128, num_experts=8)
    family = save_family(tmp_path, [model])
    store = with_residuals(build_round_robin(tmp_path / "store", family.paths), all_of("sign"))
    with load_engine(store, products=products) as engine:
        memory = lowered(engine).compile().memory_analysis()
        assert memory.temp_size_in_bytes < store.copy_bytes


@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_a_plan_without_residuals_gets_no_operands(
    tiny_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    """And of a plan with some, the layers that have any do."""
    store = build_round_robin(tmp_path / "store", tiny_family.paths)

    def operands() -> tuple[list[Any], str]:
        with load_engine(store, products=products) as engine:
            step = lowered(engine)
            return [a.dtype for a in jax.tree.leaves(step.args_info)], step.as_text()

    plain, text = operands()
    assert np.uint32 not in plain and "with_residuals" not in text
    store = with_residuals(
        store, lambda t, layer, e: [Part("up", SIGN, 1, 1)] if layer == 1 else []
    )
    some, _ = operands()
    # Records and table of the decoder's layer; the encoder's has none.
    assert sorted(map(str, some)) == sorted([*map(str, plain), "uint32", "int32"])


def test_too_many_bytes_in_a_layer(
    tiny_family: SwitchFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = with_residuals(build_round_robin(tmp_path / "store", tiny_family.paths), all_of("sign"))
    monkeypatch.setattr(module, "MOST_WORDS", 1000)
    with pytest.raises(
        EngineError, match=r"the residuals of layer 0 have \d+ bytes; the jax engine takes up to"
    ):
        load_engine(store)
