"""Products with residuals in the JAX engine, against those of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.kernels.packed_weights import part_fields
from common.plan.residual import LOW_RANK, SIGN, Part, Residual, matrices
from jax_engine.experts import residuals as module
from jax_engine.experts.dispatch import FeedForward, LoopDispatch, NativeDispatch, _ragged
from jax_engine.experts.residuals import FIELDS, LayerResiduals, part_on_device
from tests.helpers import assert_close, random_record, rest_slow
from tests.jax_engine.residual_plans import FORMS


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
        starts: list[int] = []
        for part, offset in zip(parts, residual.offsets(shapes), strict=False):
            place = names.index(part.projection)
            starts.append(sum(map(len, words)))
            table[slot, place, counts[place]] = part_fields(
                part.kind, part.bits, part.size, shapes[part.projection][1], starts, part.like
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
            Part(names[0], LOW_RANK, 4, 20, 0),  # with the v of the one before
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
