"""Our own CPU kernels for JAX: right at every shape, the same bits whatever else is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from common.kernels import packed_weights  # noqa: E402
from jax_engine import native  # noqa: E402
from tests.jax_engine.conftest import noise  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_cpu")

DTYPES = [jnp.float32, jnp.bfloat16]
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda v: np.maximum(v, 0),
    "gelu_new": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


@pytest.fixture
def kernels() -> native.Kernels:
    found = native.load()
    if found is None:
        pytest.skip("no kernels here: see native.load for what they need")
    return found


def rounded(weight: np.ndarray, dtype: Any) -> np.ndarray:
    """The weight as the kernels see it, in float64."""
    return np.asarray(jnp.asarray(weight, dtype)).astype(np.float64)


def packed_as(weight: np.ndarray, dtype: Any) -> Any:
    return native.pack(jnp.asarray(weight, dtype))


def make_pool(
    seed: int,
    num_slots: int,
    K: int,
    I: int,  # noqa: E741
    N: int,
    gated: bool,
) -> list[list[np.ndarray]]:
    shapes = [(I, K)] * (2 if gated else 1) + [(N, I)]
    return [
        [noise(seed + 10 * s + p, *shape) * shape[1] ** -0.5 for p, shape in enumerate(shapes)]
        for s in range(num_slots)
    ]


def pack_pool(pool: list[list[np.ndarray]], dtype: Any) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(packed_as(w, dtype) for w in slot) for slot in pool)


def exact_experts(
    x: np.ndarray, slots: np.ndarray, pool: Any, activation: str, gated: bool, dtype: Any
) -> np.ndarray:
    out = np.zeros((len(x), pool[0][-1].shape[0]))
    for row, slot in enumerate(slots):
        if 0 <= slot < len(pool):
            *first, last = (rounded(w, dtype) for w in pool[slot])
            hidden = ACTIVATIONS[activation](x[row].astype(np.float64) @ first[0].T)
            out[row] = (hidden * (x[row] @ first[1].T) if gated else hidden) @ last.T
    return out


@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (65, 7), (130, 96), (3, 2, 100, 5)])
@pytest.mark.parametrize("module", [np, jnp])
def test_packing_and_back(shape: tuple[int, ...], module: Any) -> None:
    weight = module.asarray(noise(0, *shape))
    packed = native.pack(weight)
    *stack, outputs, inputs = shape
    assert type(packed) is type(weight)
    assert packed.shape == (*stack, -(-outputs // 64), inputs, 64)
    assert (
        packed[(0,) * len(stack)][-1, -1, (outputs - 1) % 64] == weight[(0,) * len(stack)][-1, -1]
    )
    assert np.all(np.asarray(packed)[..., -1, :, (outputs - 1) % 64 + 1 :] == 0)
    assert np.array_equal(packed_weights.unpack(np.asarray(packed), outputs, inputs), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(64, 64), (1, 1), (8, 768), (37, 50), (100, 33), (129, 200), (320, 1030), (48, 513)],
)
def test_linear_is_right_for_any_shape_and_number_of_rows(
    dtype: Any, outputs: int, inputs: int, kernels: native.Kernels
) -> None:
    weight = noise(0, outputs, inputs) * inputs**-0.5
    packed, exact = packed_as(weight, dtype), rounded(weight, dtype)
    for rows in (*range(1, 15), 20, 64, 193, 300):
        x = noise(rows, rows, inputs)
        np.testing.assert_allclose(
            kernels.linear(jnp.asarray(x), packed, outputs), x @ exact.T, atol=1e-5, rtol=1e-5
        )


def test_linear_under_jit_with_leading_dimensions(kernels: native.Kernels) -> None:
    weight, x = noise(0, 70, 30), noise(1, 2, 3, 5, 30)
    packed = packed_as(weight, jnp.float32)

    @jax.jit
    def twice(x: Any, packed: Any) -> Any:
        return kernels.linear(x, packed, 70) + kernels.linear(2 * x, packed, 70)

    np.testing.assert_allclose(twice(x, packed), 3 * (x @ weight.T), atol=1e-4)
    assert twice(x, packed).shape == (2, 3, 5, 70)
    assert kernels.linear(jnp.zeros((0, 30)), packed, 70).shape == (0, 70)
    assert kernels.linear(jnp.zeros((30,)), packed, 70).shape == (70,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("sizes", "rows", "num_slots"),
    [((40, 64, 40), 1, 1), ((33, 100, 70), 13, 5), ((64, 130, 20), 40, 3), ((520, 70, 64), 300, 4)],
)
def test_a_whole_layer_of_experts(
    dtype: Any,
    gated: bool,
    activation: str,
    sizes: tuple[int, int, int],
    rows: int,
    num_slots: int,
    kernels: native.Kernels,
) -> None:
    pool = make_pool(0, num_slots, *sizes, gated)
    x = 2 * noise(1, rows, sizes[0])
    slots = np.random.default_rng(2).integers(-1, num_slots, rows).astype(np.int32)
    slots[0] = num_slots - 1
    found = kernels.experts(
        jnp.asarray(x),
        jnp.asarray(slots),
        pack_pool(pool, dtype),
        activation,
        gated=gated,
        intermediate_size=sizes[1],
        out_features=sizes[2],
    )
    exact = exact_experts(x, slots, pool, activation, gated, dtype)
    np.testing.assert_allclose(found, exact, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("slots", "what"),
    [
        ([2] * 9, "one slot for all"),
        ([0, 3, 0, 3, 3, 0, 0, 0, 3], "empty groups between"),
        ([-1] * 9, "no row has a slot"),
        ([0, -1, 1, 4, 2**31 - 1, -(2**31), 3, 1, 0], "some outside"),
        ([3], "one row"),
    ],
)
def test_which_slots_are_named(slots: list[int], what: str, kernels: native.Kernels) -> None:
    pool = make_pool(3, 4, 48, 96, 48, gated=False)
    x, named = noise(4, len(slots), 48), np.array(slots, np.int32)
    call = jax.jit(
        lambda x, slots, pool: kernels.experts(x, slots, pool, "relu", intermediate_size=96)
    )
    found = np.asarray(call(x, named, pack_pool(pool, jnp.float32)))
    np.testing.assert_allclose(
        found, exact_experts(x, named, pool, "relu", False, jnp.float32), atol=1e-5, err_msg=what
    )
    assert np.all(found[(named < 0) | (named > 3)] == 0)


def test_slots_that_no_row_names_are_not_read(kernels: native.Kernels) -> None:
    pool = make_pool(5, 3, 32, 64, 32, gated=False)
    expected = exact_experts(
        noise(6, 4, 32), np.array([0, 2, 2, 0]), pool, "relu", False, jnp.float32
    )
    pool[1] = [w * np.nan for w in pool[1]]
    found = kernels.experts(
        jnp.asarray(noise(6, 4, 32)),
        jnp.array([0, 2, 2, 0]),
        pack_pool(pool, jnp.float32),
        "relu",
        intermediate_size=64,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_experts_with_leading_dimensions_and_no_rows(kernels: native.Kernels) -> None:
    pool = pack_pool(make_pool(7, 2, 32, 64, 32, gated=True), jnp.float32)
    x, slots = jnp.asarray(noise(8, 2, 3, 32)), jnp.array([[0, 1, 1], [-1, 0, 1]])

    def call(x: Any, slots: Any) -> np.ndarray:
        return np.asarray(
            kernels.experts(x, slots, pool, "gelu_new", gated=True, intermediate_size=64)
        )

    assert np.array_equal(call(x, slots).reshape(6, 32), call(x.reshape(6, 32), slots.reshape(6)))
    assert call(x[:0], slots[:0]).shape == (0, 3, 32)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_far_out(activation: str, kernels: native.Kernels) -> None:
    """Large arguments neither overflow nor lose NaN, small ones keep their relative precision."""
    values = np.concatenate(
        [np.linspace(-120, 120, 121), [1e-6, -1e-6, 1e-30, 3e4, -3e4, np.nan]]
    ).astype(np.float32)
    identity = pack_pool([[np.ones((1, 1), np.float32)] * 2], jnp.float32)
    slots = jnp.zeros(len(values), jnp.int32)
    found = kernels.experts(
        jnp.asarray(values[:, None]), slots, identity, activation, intermediate_size=1
    )
    with np.errstate(over="ignore"):
        exact = ACTIVATIONS[activation](values.astype(np.float64))
    np.testing.assert_allclose(np.asarray(found)[:, 0], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_has_the_same_bits_in_any_company(
    dtype: Any, gated: bool, kernels: native.Kernels
) -> None:
    pool = pack_pool(make_pool(9, 3, 600, 200, 600, gated), dtype)
    x, slots = noise(10, 300, 600), np.random.default_rng(11).integers(0, 3, 300).astype(np.int32)
    slots[100:] = 1  # one group of several work items

    def experts(rows: slice) -> np.ndarray:
        named = jnp.asarray(slots[rows])
        call = kernels.experts(
            jnp.asarray(x[rows]), named, pool, "gelu_new", gated=gated, intermediate_size=200
        )
        return np.asarray(call)

    def linear(rows: slice) -> np.ndarray:
        return np.asarray(kernels.linear(jnp.asarray(x[rows]), pool[0][0], 200))

    for function in (experts, linear):
        together = function(slice(None))
        for first in (0, 57, 299):
            for count in (*range(1, 14), 40, 200):
                part = slice(first, first + count)
                assert np.array_equal(function(part), together[part]), (function, first, count)


@pytest.mark.parametrize("rows", [1, 9, 300])
def test_any_number_of_threads_gives_the_same_bits(rows: int, kernels: native.Kernels) -> None:
    pool = pack_pool(make_pool(12, 4, 300, 520, 300, gated=True), jnp.float32)
    x, slots = jnp.asarray(noise(13, rows, 300)), jnp.asarray(np.arange(rows) % 5 - 1).at[0].set(2)

    def both(threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        some = replace(kernels, threads=threads)
        layer = some.experts(x, slots, pool, "silu", gated=True, intermediate_size=520)
        return np.asarray(layer), np.asarray(some.linear(x, pool[0][0], 520))

    expected = both(1)
    for threads in (None, 2, 3, 7, 40):
        for _ in range(5):
            assert all(
                np.array_equal(a, b) for a, b in zip(both(threads), expected, strict=True)
            ), threads


def test_calls_at_the_same_time_do_not_disturb_or_block_each_other(kernels: native.Kernels) -> None:
    many = replace(kernels, threads=6)
    pool = pack_pool(make_pool(14, 4, 128, 256, 128, gated=False), jnp.float32)
    call = jax.jit(lambda x, slots: many.experts(x, slots, pool, "relu", intermediate_size=256))
    slots = jnp.asarray(np.arange(20, dtype=np.int32) % 4)
    inputs = [jnp.asarray(noise(20 + i, 20, 128)) for i in range(4)]
    alone = [np.asarray(call(x, slots)) for x in inputs]

    def repeat(i: int) -> bool:
        return all(np.array_equal(call(inputs[i], slots), alone[i]) for _ in range(100))

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(repeat, range(4)))


def test_wrong_arguments_are_refused_by_name(kernels: native.Kernels) -> None:
    pool = pack_pool(make_pool(15, 2, 32, 64, 32, gated=False), jnp.float32)
    x, slots = jnp.zeros((3, 32)), jnp.zeros(3, jnp.int32)
    (wi, wo), half = pool[0], pack_pool(make_pool(15, 1, 32, 64, 32, gated=False), jnp.bfloat16)[0]
    for call, message in (
        (
            lambda: kernels.linear(x, wi, 65),
            r"packed weight is \[1, 32, 64\], expected \[2, 32, 64\]",
        ),
        (
            lambda: kernels.linear(x, wo, 64),
            r"packed weight is \[1, 64, 64\], expected \[1, 32, 64\]",
        ),
        (lambda: kernels.linear(x, wi.astype(jnp.float16), 64), "all float32 or all bfloat16"),
        (lambda: kernels.linear(x, wi[0], 64), r"packed weight is \[32, 64\]"),
        (lambda: kernels.linear(x.astype(jnp.bfloat16), wi, 64), "x is bfloat16"),
        (
            lambda: kernels.experts(x, slots, (*pool, half), "relu", intermediate_size=64),
            "slot 2, projection 0 is",
        ),
        (
            lambda: kernels.experts(x, slots, ((wi, wi),), "relu", intermediate_size=64),
            "slot 0, projection 1 is",
        ),
        (
            lambda: kernels.experts(x, slots, pool, "relu", intermediate_size=65),
            r"expected \[2, 32, 64\]",
        ),
        (
            lambda: kernels.experts(x, slots, (), "relu", intermediate_size=64),
            "0 arrays in the pool",
        ),
        (
            lambda: kernels.experts(x, slots, pool, "tanh", intermediate_size=64),
            "activation 'tanh'",
        ),
        (
            lambda: kernels.experts(x, slots[:2], pool, "relu", intermediate_size=64),
            "one slot for each row",
        ),
        (
            lambda: kernels.experts(x, slots, pool, "relu", intermediate_size=64, gated=True),
            "2 projections, expected 3",
        ),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()
