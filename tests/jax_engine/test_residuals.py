"""Residuals and merged copies in the JAX engine, against Hugging Face's model with the weights that
the store serves; and what an observer is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common import Engine, EngineError, SamplingParams, Store, load_engine
from common.plan.residual import LOW_RANK, SIGN, Part, Residual, matrices, row_bytes
from jax_engine.experts import residuals as module
from jax_engine.experts.dispatch import FeedForward, LoopDispatch, NativeDispatch, _ragged
from jax_engine.experts.residuals import FIELDS, KINDS, LayerResiduals, part_on_device
from tests.helpers import assert_close, build_round_robin, padded, prompts, random_record, rest_slow
from tests.jax_engine.conftest import SwitchFamily, save_family
from tests.jax_engine.test_oracle import EVERY_WAY, check, load
from tests.jax_engine.test_steps import backend_of, backend_rows, lowered_decode
from tests.switch_models import (
    Model,
    hf_greedy,
    hf_logits,
    oracle_of_store,
    random_switch,
    sparse_mlps,
    tuned,
    with_capacity,
    with_residuals,
)

FREE = SamplingParams(max_new_tokens=5, ignore_eos=True)

FORMS: dict[str, tuple[str, int, int]] = {
    "sign": (SIGN, 1, 1),
    "sign, 7 rows to a scale": (SIGN, 1, 7),
    "2 bits": (LOW_RANK, 2, 5),
    "4 bits": (LOW_RANK, 4, 17),
    "8 bits": (LOW_RANK, 8, 3),
    "16 bits": (LOW_RANK, 16, 2),
    "32 bits": (LOW_RANK, 32, 1),
}


@pytest.fixture(scope="module")
def small_family(tmp_path_factory: pytest.TempPathFactory) -> SwitchFamily:
    """base, ana and bob: one sparse layer a side with 4 experts, vocabulary 96, float32."""
    base = random_switch(0)
    return save_family(tmp_path_factory.mktemp("small"), [base, tuned(base, 1), tuned(base, 2)])


def all_of(form: str, projections: Sequence[str] = ("up", "down")) -> Any:
    """Every tenant has one part of this form everywhere."""
    return lambda tenant, layer, expert: [Part(p, *FORMS[form]) for p in projections]


def mixed(tenant: int, layer: int, expert: int, gated: bool = False) -> list[Part]:
    """Tenants with other kinds and ranks, several parts a matrix, some projections alone; the first
    has none."""
    names = ("gate", "up", "down") if gated else ("up", "down")
    if tenant == 0 or (layer + expert) % 4 == 3:
        return []
    if tenant == 1:
        return [
            Part(names[0], SIGN, 1, 3),
            Part(names[-1], LOW_RANK, 4, 4 + expert),
            Part(names[0], LOW_RANK, 8, 2),
            Part(names[0], LOW_RANK, 2, 19),
            Part(names[-1], SIGN, 1, 1000),
        ][: 2 + expert]
    return [Part(names[(layer + expert) % len(names)], LOW_RANK, 16, 1 + expert)]


def served(family: SwitchFamily, store: Store) -> list[Model]:
    return [oracle_of_store(m, store, n) for m, n in zip(family.models, store.tenants, strict=True)]


# Products alone.


def layer_of(
    specs: Sequence[Sequence[Part]], shapes: dict[str, tuple[int, ...]], blocked: bool = False
) -> tuple[LayerResiduals, list[dict[str, np.ndarray]]]:
    """What slots with these parts add, as the engine holds it (NaN around the records), and as
    matrices."""
    names = list(shapes)
    words, dense = [np.full(4, 0xFFFFFFFF, np.uint32)], []
    table = np.zeros((len(specs), len(names), max([1, *map(len, specs)]), FIELDS), np.int32)
    for slot, parts in enumerate(specs):
        residual = Residual(0, 0, 0, tuple(parts))
        record = random_record(parts, shapes, slot, 0.07)
        counts = [0] * len(names)
        for part, offset in zip(parts, residual.offsets(shapes), strict=False):
            place = names.index(part.projection)
            table[slot, place, counts[place]] = (
                KINDS[part.kind],
                part.bits,
                part.size,
                sum(map(len, words)),
            )
            counts[place] += 1
            words.append(
                part_on_device(record[offset:], part, shapes[part.projection], blocked).view(
                    np.uint32
                )
            )
        dense.append(matrices(residual, record, shapes))
    forms = tuple(
        tuple(sorted({(p.kind, p.bits) for parts in specs for p in parts if p.projection == name}))
        for name in names
    )
    room = max(module._room(f, s) for f, s in zip(forms, shapes.values(), strict=True))
    words.append(np.full(room, 0xFFFFFFFF, np.uint32))
    return LayerResiduals(jnp.asarray(np.concatenate(words)), jnp.asarray(table), forms), dense


PARTS: dict[str, list[Part]] = {
    **{
        f"{form}, {size}": [Part("up", *FORMS[form][:2], size)]
        for form in FORMS
        for size in (1, 16, 33)
    },
    "several": [Part("up", *FORMS[form]) for form in FORMS],
    "last projection": [Part("down", SIGN, 1, 4), Part("down", LOW_RANK, 2, 3)],
    "none": [],
}


@pytest.mark.parametrize("sizes", rest_slow([(45, 70), (64, 128), (3, 5), (200, 33)]), ids=str)
def test_products_are_those_of_the_matrices(sizes: tuple[int, int]) -> None:
    hidden, inter = sizes
    shapes = {"up": (inter, hidden), "down": (hidden, inter)}
    residuals, dense = layer_of(list(PARTS.values()), shapes)
    rng = np.random.default_rng(1)
    for i, (name, shape) in enumerate(shapes.items()):
        run = jax.jit(lambda r, x, slot, i=i, n=shape[0]: r.product(x, slot, i, n))
        x = rng.standard_normal((3, shape[1])).astype(np.float32)
        for slot, matrix in enumerate(dense):
            expected = x @ matrix[name].T if name in matrix else np.zeros((3, shape[0]), np.float32)
            assert_close(
                np.asarray(run(residuals, x, np.int32(slot))), expected, 1e-4, list(PARTS)[slot]
            )


def test_a_projection_without_residuals_costs_nothing() -> None:
    residuals, _ = layer_of([[Part("down", SIGN, 1, 1)]], {"up": (8, 4), "down": (4, 8)})
    assert residuals.product(jnp.ones((2, 4)), jnp.int32(0), 0, 8) is None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", rest_slow(["native", "loop", "ragged"], 2))
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    rest_slow([(7, (64, 128)), (1, (45, 70)), (150, (37, 90))], names=2),
    ids=str,
)
def test_a_layer_equals_a_loop_over_tokens(
    way: str, gated: bool, tokens: int, sizes: tuple[int, int]
) -> None:
    hidden, inter = sizes
    names = ("gate", "up") if gated else ("up",)
    shapes = {**dict.fromkeys(names, (inter, hidden)), "down": (hidden, inter)}
    specs: list[list[Part]] = [
        [],
        [Part(name, SIGN, 1, 5) for name in shapes],
        [
            Part(names[-1], LOW_RANK, 4, 20),
            Part("down", LOW_RANK, 16, 3),
            Part(names[-1], SIGN, 1, 1),
        ],
        [
            Part("down", LOW_RANK, 2, 40),
            Part("down", LOW_RANK, 8, 1),
            Part(names[0], LOW_RANK, 32, 2),
        ],
    ]
    residuals, dense = layer_of(specs, shapes, blocked=way == "native")
    rng, slots = np.random.default_rng(tokens), len(specs)
    copies = [
        [rng.standard_normal(s).astype(np.float32) * s[1] ** -0.5 for s in shapes.values()]
        for _ in specs
    ]
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    chosen = rng.integers(-1, slots + 1, tokens) if tokens > 1 else np.array([2])
    ff = FeedForward("relu", gated, inter)
    ids = jnp.asarray(chosen, jnp.int32)
    if way == "native":
        from jax_engine import native

        kernels = native.load()
        if kernels is None:
            pytest.skip("no kernels of our own here: see native.load for what they need")
        packed = [tuple(native.pack(jnp.asarray(w)) for w in copy) for copy in copies]
        found = jax.jit(lambda x, i, r: NativeDispatch(kernels)(x, i, packed, ff, r))(
            x, ids, residuals
        )
        for threads in (1, 2, 5):
            few = replace(kernels, threads=threads)
            again = jax.jit(lambda x, i, r, k=few: NativeDispatch(k)(x, i, packed, ff, r))(
                x, ids, residuals
            )
            assert np.array_equal(np.asarray(again), np.asarray(found))
    elif way == "loop":
        held = [tuple(jnp.asarray(w) for w in copy) for copy in copies]
        found = jax.jit(lambda x, i, r: LoopDispatch()(x, i, held, ff, r))(x, ids, residuals)
    else:
        stack = tuple(jnp.asarray(np.stack(ws)) for ws in zip(*copies, strict=True))
        found = jax.jit(lambda x, i, r: _ragged(x, i, stack, ff, r))(x, ids, residuals)
    expected = np.zeros((tokens, hidden))
    for t, slot in enumerate(chosen):
        if 0 <= slot < slots:
            whole = [
                w + dense[slot].get(name, 0) for name, w in zip(shapes, copies[slot], strict=True)
            ]
            inner = [np.asarray(w, np.float64) @ x[t] for w in whole[:-1]]
            active = np.maximum(inner[0], 0) * (inner[1] if gated else 1)
            expected[t] = whole[-1].astype(np.float64) @ active
    assert_close(np.asarray(found), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["native", "loop"])
@pytest.mark.parametrize("tokens", rest_slow([3, 16, 500]))
def test_tokens_of_several_tenants_go_through_a_layer_together(
    way: str, tokens: int, gated: bool
) -> None:
    """Each gets what a call for its own tenant gives it: the same bits from our own kernels."""
    names = ("gate", "up") if gated else ("up",)
    shapes = {**dict.fromkeys(names, (70, 45)), "down": (45, 70)}
    slots, tenants = 3, 4  # the last tenant has no residuals, and pads the table
    forms = [
        [Part(names[0], SIGN, 1, 5)],
        [Part("down", LOW_RANK, 4, 20), Part(names[-1], SIGN, 1, 1)],
        [],
    ]
    specs = [forms[(t + s) % 3] if t < 3 else [] for t in range(tenants) for s in range(slots)]
    joint, _ = layer_of(specs, shapes, blocked=way == "native")
    rng = np.random.default_rng(tokens)
    copies = [
        [rng.standard_normal(s).astype(np.float32) * s[1] ** -0.5 for s in shapes.values()]
        for _ in range(slots)
    ]
    x = rng.standard_normal((tokens, 45)).astype(np.float32)
    of_tenant, of_slot = rng.integers(0, tenants, tokens), rng.integers(0, slots, tokens)
    none = rng.random(tokens) < 0.1
    dispatch: Any = LoopDispatch()
    held: Any = [tuple(jnp.asarray(w) for w in copy) for copy in copies]
    if way == "native":
        from jax_engine import native

        kernels = native.load()
        if kernels is None:
            pytest.skip("no kernels of our own here: see native.load for what they need")
        dispatch, held = (
            NativeDispatch(kernels),
            [tuple(native.pack(w) for w in copy) for copy in held],
        )
    run = jax.jit(
        lambda x, numbers, r: dispatch(x, numbers, held, FeedForward("relu", gated, 70), r)
    )
    numbers = np.where(none, -1, of_tenant * slots + of_slot).astype(np.int32)
    found = np.asarray(run(x, numbers, joint))
    for tenant in range(tenants):
        own = replace(joint, table=joint.table[tenant * slots : (tenant + 1) * slots])
        expected = np.asarray(run(x, np.where(none, -1, of_slot).astype(np.int32), own))
        mine = of_tenant == tenant
        if way == "native":
            assert np.array_equal(found[mine], expected[mine])
        else:
            assert_close(found, np.where(mine[:, None], expected, found), 1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 9), (1, 3), (2, 0), (2, 10**6), (2, 2**31 - 1), (3, -1), (3, 10**8)],
    ids=str,
)
@pytest.mark.parametrize("kind", [SIGN, LOW_RANK])
def test_the_kernels_refuse_a_damaged_table(kind: str, field: int, value: int) -> None:
    from jax_engine import native

    kernels = native.load()
    if kernels is None:
        pytest.skip("no kernels of our own here: see native.load for what they need")
    if kind == SIGN and field == 2 and value > 0:
        pytest.skip("any number of rows may share a scale")
    shapes = {"up": (24, 16), "down": (16, 24)}
    residuals, _ = layer_of(
        [[Part("down", *FORMS["sign" if kind == SIGN else "4 bits"])]], shapes, blocked=True
    )
    table = np.array(residuals.table)
    table[0, 1, 0, field] = value
    copies = [tuple(native.pack(jnp.ones(s)) for s in shapes.values())]

    def run(table: np.ndarray, slot: int) -> Any:
        held = replace(residuals, table=jnp.asarray(table))
        ids = jnp.full(2, slot, jnp.int32)
        return NativeDispatch(kernels)(
            jnp.ones((2, 16)), ids, copies, FeedForward("relu", False, 24), held
        )

    with pytest.raises(Exception, match="which is none, or lies outside the records"):
        run(table, 0).block_until_ready()
    assert not np.asarray(run(table, -1)).any()  # no slot of it is hit
    with pytest.raises(Exception, match="the residuals' table is"):
        run(table[:, :1], 0).block_until_ready()


# Whole models.


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("form", rest_slow(FORMS))
def test_every_form_equals_hugging_face(
    small_family: SwitchFamily, tmp_path: Path, form: str, options: dict[str, Any]
) -> None:
    store = with_residuals(build_round_robin(tmp_path / "store", small_family.paths), all_of(form))
    with load(store, **options) as engine:
        check(engine, "ana", served(small_family, store)[1])


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("slots", rest_slow([5, None, "all"]))
def test_merged_copies_and_mixed_residuals_equal_hugging_face(
    small_family: SwitchFamily, tmp_path: Path, slots: Any, options: dict[str, Any]
) -> None:
    """Several parts a matrix, some projections alone, a tenant without any; with 5 slots, misses
    beside them."""
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths, slots=slots),
        mixed,
        merged=(0, 2, 3),
    )
    assert store.plan.residuals
    with load(store, **options) as engine:
        for i, model in enumerate(served(small_family, store)):
            check(engine, engine.tenants[i], model, seed=i)
        assert (engine.stats()["misses"] > 0) == (slots == 5)


@pytest.mark.slow
def test_residuals_are_no_small_thing(small_family: SwitchFamily, tmp_path: Path) -> None:
    """What the tests above add moves the logits by far more than they allow."""
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths), all_of("sign")
    )
    ids, answers = prompts(0, [9]), prompts(1, [6])
    plain = build_round_robin(tmp_path / "plain", small_family.paths)
    with load_engine(store) as engine, load_engine(plain) as without:
        difference = np.abs(
            engine.logits("ana", ids, answers) - without.logits("ana", ids, answers)
        )
        assert difference.max() > 1


@pytest.mark.slow
def test_merged_copies_alone(small_family: SwitchFamily, tmp_path: Path) -> None:
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths), lambda *_: [], merged=range(8)
    )
    assert not store.plan.residuals
    with load_engine(store) as engine:
        for i, model in enumerate(served(small_family, store)):
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
    small_family: SwitchFamily, tmp_path: Path, mesh: tuple[int, int], slots: Any
) -> None:
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths, slots=slots), mixed, merged=(0, 3)
    )
    with load_engine(store, mesh=mesh) as engine:
        for i in (1, 2):
            check(engine, engine.tenants[i], served(small_family, store)[i], seed=i)


# Memory, compilations, what a plan without residuals gets.


@pytest.mark.slow
@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_a_switch_compiles_and_copies_nothing(
    small_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    """The tenants have other kinds and ranks, and one has no residuals at all."""
    store = with_residuals(build_round_robin(tmp_path / "store", small_family.paths), mixed)
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
                served(small_family, store)[engine.tenants.index(name)], row, 5
            )
        after = engine.stats()
        assert after["compilations"] == before["compilations"] and after["reconfigured_bytes"] == 0
        assert places() == where


@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_bytes_are_counted_and_freed(
    small_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
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
    small_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    """And of a plan with some, the layers that have any do."""
    store = build_round_robin(tmp_path / "store", small_family.paths)

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
    small_family: SwitchFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths), all_of("sign")
    )
    monkeypatch.setattr(module, "MOST_WORDS", 1000)
    with pytest.raises(
        EngineError, match=r"the residuals of layer 0 have \d+ bytes; the jax engine takes up to"
    ):
        load_engine(store)


# The observer.


class Seen:
    """What an observer was shown; `answer` is given back."""

    def __init__(self, answer: Any = None):
        self.calls: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.answer = answer

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        self.calls.append((tenant, layer, x, expert_ids, gates))
        return None if self.answer is None else self.answer(layer, x)


def push(layer: int, x: np.ndarray) -> np.ndarray:
    """Something that depends on layer and token."""
    return (0.3 + 0.1 * layer) * np.roll(x, 1, axis=-1)


class HuggingFaceRouters:
    """Inputs, choices and probabilities of a model's routers, of the tokens that count, a list for
    each layer.

    moved: whether to add `push` to the outputs of the sparse layers at these tokens.
    """

    def __init__(self, model: Model, mask: np.ndarray, moved: bool = False):
        self.found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        encoder_layers = model.config.num_sparse_encoder_layers

        def look(
            layer: int, x: torch.Tensor, chosen: torch.Tensor, gate: torch.Tensor
        ) -> torch.Tensor:
            live = (
                torch.as_tensor(mask).bool()
                if layer < encoder_layers
                else torch.ones(x.shape[:2], dtype=bool)
            )
            taken = live & (chosen.sum(-1) > 0)
            self.found[layer] = (
                x[taken].numpy(),
                chosen.argmax(-1)[taken].numpy(),
                gate[taken][:, 0].numpy(),
            )
            return taken

        def hook(layer: int) -> Any:
            def after(mlp: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
                (x,) = arguments
                chosen, gate, _ = mlp.router(x)
                taken = look(layer, x, chosen, gate)
                if moved:
                    output = output.clone()
                    output[taken] += torch.from_numpy(push(layer, x[taken].numpy()))
                return output

            return after

        for layer, mlp in enumerate(sparse_mlps(model)):
            mlp.register_forward_hook(hook(layer))


@pytest.mark.parametrize(
    "options", [*EVERY_WAY, pytest.param({"mesh": (2, 4)}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("slots", "capacity", "moved"),
    rest_slow([(5, None, True), (None, 2, False), ("all", 3, True)], names=3),
)
def test_an_observer_sees_what_hugging_faces_routers_do(
    small_family: SwitchFamily,
    tmp_path: Path,
    slots: Any,
    capacity: Any,
    options: dict[str, Any],
    moved: bool,
) -> None:
    if "mesh" in options and len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 virtual CPU devices: see tests/conftest.py")
    store = with_residuals(
        build_round_robin(tmp_path / "store", small_family.paths, slots=slots), mixed, merged=(0,)
    )
    model = with_capacity(served(small_family, store)[1], capacity or 4096)
    rows, answers = prompts(0, [9, 4, 17]), np.array(prompts(1, [6, 6, 6]))
    ids, mask = padded(rows)
    theirs = HuggingFaceRouters(model, mask, moved)
    expected = hf_logits(model, ids, answers, mask)
    seen = Seen(push if moved else None)
    with load(store, expert_capacity=capacity, **options) as engine:
        engine.observe(seen)
        assert_close(engine.logits("ana", ids, answers, mask), expected)
        assert [(tenant, layer) for tenant, layer, *_ in seen.calls] == [("ana", 0), ("ana", 1)]
        for layer, (_, _, x, expert_ids, gates) in enumerate(seen.calls):
            inputs, chosen, gate = theirs.found[layer]
            assert (x.dtype, expert_ids.dtype, gates.dtype) == (np.float32, np.int64, np.float32)
            assert np.array_equal(expert_ids, chosen[:, None])
            assert_close(x, inputs, what="inputs")
            assert_close(gates, gate[:, None], what="gates")
        if capacity:
            assert len(seen.calls[0][2]) < sum(map(len, rows))  # some were dropped
        engine.observe(None)
        engine.logits("ana", ids, answers, mask)
        assert len(seen.calls) == 2


def test_an_observer_sees_every_step_and_tenant(small_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    seen = Seen()
    requests = [("base", [5, 6, 7]), ("ana", [8, 9])]
    with load_engine(store) as engine:
        alone = [engine.generate(tenant, row, FREE).token_ids for tenant, row in requests]
        engine.observe(seen)
        together = engine.generate_batch(requests, FREE)
        assert [a.token_ids for a in together] == alone
        for tenant, row in requests:
            tokens = [len(x) for name, layer, x, *_ in seen.calls if (name, layer) == (tenant, 0)]
            assert tokens == [len(row)]  # the encoder reads the prompt once
            tokens = [len(x) for name, layer, x, *_ in seen.calls if (name, layer) == (tenant, 1)]
            assert tokens == [1] * 5
        with pytest.raises(
            EngineError,
            match=r"the observer returned \[3\], expected \[tokens, hidden\] = \(3, 32\)",
        ):
            engine.observe(lambda *_: np.zeros(3, np.float32))
            engine.generate("base", [5, 6, 7], FREE)
