"""The packed format: round trips, and bytes written out by hand, so that files and kernels keep
meaning the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import Plan, PlanError, plan_round_robin
from common.plan.plan import MERGED, Copy
from common.plan.residual import (
    ALIGNMENT,
    LOW_RANK,
    LOW_RANK_BITS,
    SIGN,
    Part,
    Residual,
    join_parts,
    matrices,
    pack_codes,
    pack_low_rank,
    pack_sign,
    part_matrix,
    row_bytes,
    unpack_codes,
    unpack_low_rank,
    unpack_sign,
)
from tests.helpers import examples, random_record

sizes = st.integers(1, 40)


def data_of(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


# Layout, by hand.


def test_codes_lie_from_the_lowest_bit_up() -> None:
    bits = [[1, 0, 1, 1, 0, 0, 0, 0, 1]]  # bits 0, 2, 3 of the first byte, bit 0 of the second
    assert pack_codes(np.array(bits), 1).tolist() == [[0b00001101, 1, 0, 0]]
    assert pack_codes(np.array([[3, 0, 1, 2, 3]]), 2).tolist() == [[0b10010011, 0b11, 0, 0]]
    assert pack_codes(np.array([[0xA, 0x3, 0xF]]), 4).tolist() == [[0x3A, 0x0F, 0, 0]]
    assert pack_codes(np.array([[200, 1, 2, 3, 4]]), 8).tolist() == [[200, 1, 2, 3, 4, 0, 0, 0]]


def test_rows_are_padded_to_four_bytes() -> None:
    assert [row_bytes(n, 1) for n in (1, 32, 33)] == [4, 4, 8]
    assert [row_bytes(n, 2) for n in (1, 16, 17)] == [4, 4, 8]
    assert [row_bytes(n, 16) for n in (1, 2, 3)] == [4, 4, 8]
    assert [row_bytes(n, 32) for n in (1, 3)] == [4, 12]


def test_bytes_of_signs() -> None:
    # Three rows, two to a scale: 1.5 is 0x3FC0 in bfloat16, 2.0 is 0x4000; then a word of signs a
    # row.
    positive = np.array([[True, False], [False, True], [True, True]])
    data = pack_sign(np.array([1.5, 2.0], dtype=np.float32), positive, 2)
    assert data.tolist() == [0xC0, 0x3F, 0x00, 0x40, 0b01, 0, 0, 0, 0b10, 0, 0, 0, 0b11, 0, 0, 0]
    part = Part("w", SIGN, 1, 2)
    assert part.nbytes((3, 2)) == len(data)
    assert part_matrix(data, part, (3, 2)).tolist() == [[1.5, -1.5], [-1.5, 1.5], [2.0, 2.0]]
    # One scale is padded to a word.
    assert pack_sign(np.array([1.5], dtype=np.float32), positive, 3).tolist()[:4] == [
        0xC0,
        0x3F,
        0,
        0,
    ]
    with pytest.raises(ValueError, match="2 scales for 3 rows, 3 to a scale"):
        pack_sign(np.array([1.5, 2.0], dtype=np.float32), positive, 3)


def test_bytes_of_low_rank() -> None:
    # One component of a matrix [2, 3]: scale 0.5 is 0x3F000000; v = (3, 0, 2), u = (1, 3) in 2
    # bits.
    data = pack_low_rank(
        np.array([0.5], dtype=np.float32), np.array([[3, 0, 2]]), np.array([[1, 3]]), 2
    )
    assert data.tolist() == [0, 0, 0, 0x3F, 0b100011, 0, 0, 0, 0b1101, 0, 0, 0]
    part = Part("w", LOW_RANK, 2, 1)
    assert part.nbytes((2, 3)) == len(data)
    # Codes stand for c - 1.5: v = (1.5, -1.5, 0.5), u = (-0.5, 1.5).
    expected = 0.5 * np.outer([-0.5, 1.5], [1.5, -1.5, 0.5])
    assert part_matrix(data, part, (2, 3)).tolist() == expected.tolist()


def test_bytes_of_wide_numbers() -> None:
    scale, v, u = (
        np.array([2.0, 1.0]),
        np.array([[1.0], [-2.0]]),
        np.array([[0.5, 1.0], [3.0, 4.0]]),
    )
    data = pack_low_rank(scale.astype(np.float32), v, u, 16)
    # float16: 1.0 is 0x3C00, -2.0 is 0xC000, 0.5 is 0x3800, 3.0 is 0x4200, 4.0 is 0x4400; a row of
    # one is padded.
    scales = [0, 0, 0, 0x40, 0, 0, 0x80, 0x3F]
    rows = [0x00, 0x3C, 0, 0, 0x00, 0xC0, 0, 0, 0x00, 0x38, 0x00, 0x3C, 0x00, 0x42, 0x00, 0x44]
    assert data.tolist() == scales + rows
    expected = 2 * np.outer([0.5, 1], [1]) + np.outer([3, 4], [-2])
    assert part_matrix(data, Part("w", LOW_RANK, 16, 2), (2, 1)).tolist() == expected.tolist()
    wide = pack_low_rank(scale.astype(np.float32), v, u, 32)
    assert wide[8:12].tolist() == [0, 0, 0x80, 0x3F] and len(wide) == 8 + 2 * 4 + 2 * 8
    assert part_matrix(wide, Part("w", LOW_RANK, 32, 2), (2, 1)).tolist() == expected.tolist()


def test_parts_of_a_record_begin_at_multiples_of_sixteen() -> None:
    shapes = {"gate": (3, 2), "down": (2, 3)}
    parts = (Part("gate", SIGN, 1, 2), Part("down", LOW_RANK, 2, 1), Part("down", SIGN, 1, 1))
    residual = Residual(0, 0, 0, parts)
    assert [p.nbytes(shapes[p.projection]) for p in parts] == [16, 12, 12]
    assert residual.offsets(shapes) == [0, 16, 32, 48] and residual.nbytes(shapes) == 48
    first = pack_sign(np.ones(2, np.float32), np.ones((3, 2), bool), 2)
    second = pack_low_rank(np.ones(1, np.float32), np.array([[3, 3, 3]]), np.array([[3, 3]]), 2)
    third = pack_sign(np.ones(2, np.float32), np.zeros((2, 3), bool), 1)
    record = join_parts([first, second, third])
    assert len(record) == 48 and record[28:32].tolist() == [0, 0, 0, 0]
    found = matrices(residual, record, shapes)
    assert found["gate"].tolist() == [[1, 1]] * 3
    assert (
        found["down"].tolist() == [[1.25] * 3] * 2
    )  # 1.5 * 1.5 - 1: parts of one projection add up
    with pytest.raises(PlanError, match="record has 47 bytes, its parts need 48"):
        matrices(residual, record[:47], shapes)
    with pytest.raises(PlanError, match="projection 'w9'; there is: gate, down"):
        Residual(0, 0, 0, (Part("w9", SIGN, 1, 1),)).nbytes(shapes)
    assert len(join_parts([])) == 0


# Round trips.


@settings(max_examples=examples(150), deadline=None)
@given(bits=st.sampled_from([1, 2, 4, 8]), rows=sizes, count=sizes, seed=st.integers(0, 2**32 - 1))
def test_codes_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(rows, count))
    packed = pack_codes(codes, bits)
    assert (
        packed.dtype == np.uint8
        and packed.shape == (rows, row_bytes(count, bits))
        and packed.shape[1] % 4 == 0
    )
    np.testing.assert_array_equal(unpack_codes(packed, bits, count), codes)
    # One by one, as the module's docstring says where a code lies.
    for j in range(count):
        np.testing.assert_array_equal(
            (packed[:, j * bits // 8] >> (j * bits % 8)) & (2**bits - 1), codes[:, j]
        )


@settings(max_examples=examples(100), deadline=None)
@given(outputs=sizes, inputs=sizes, size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_signs_come_back(outputs: int, inputs: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Numbers that bfloat16 holds exactly.
    scale = rng.integers(1, 256, size=-(-outputs // size)).astype(np.float32) / 64
    positive = rng.random((outputs, inputs)) < 0.5
    part = Part("w", SIGN, 1, size)
    data = pack_sign(scale, positive, size)
    assert len(data) == part.nbytes((outputs, inputs))
    # What follows in the record is not read.
    found_scale, found = unpack_sign(np.append(data, data_of(255, 255)), part, (outputs, inputs))
    np.testing.assert_array_equal(found, positive)
    np.testing.assert_array_equal(found_scale, scale[np.arange(outputs) // size])
    expected = np.where(positive, 1, -1) * found_scale[:, None]
    np.testing.assert_array_equal(part_matrix(data, part, (outputs, inputs)), expected)


@settings(max_examples=examples(100), deadline=None)
@given(
    bits=st.sampled_from(LOW_RANK_BITS),
    rank=st.integers(1, 12),
    outputs=sizes,
    inputs=sizes,
    seed=st.integers(0, 2**32),
)
def test_low_rank_comes_back(bits: int, rank: int, outputs: int, inputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if bits <= 8:
        v, u = (rng.integers(0, 2**bits, size=(rank, n)) for n in (inputs, outputs))
        numbers = [m - (2**bits - 1) / 2 for m in (v, u)]
    else:
        kind = np.float16 if bits == 16 else np.float32
        v, u = (rng.standard_normal((rank, n)).astype(kind) for n in (inputs, outputs))
        numbers = [v, u]
    scale = rng.standard_normal(rank).astype(np.float32)
    part = Part("w", LOW_RANK, bits, rank)
    data = pack_low_rank(scale, v, u, bits)
    assert len(data) == part.nbytes((outputs, inputs))
    found = unpack_low_rank(np.append(data, data_of(255, 255)), part, (outputs, inputs))
    for mine, expected in zip(found, (scale, *numbers), strict=True):
        np.testing.assert_array_equal(mine, np.asarray(expected, dtype=np.float32))
    expected = (numbers[1].astype(np.float64) * scale[:, None]).T @ numbers[0].astype(np.float64)
    largest = float(np.abs(numbers[0]).max() * np.abs(numbers[1]).max() * np.abs(scale).sum())
    np.testing.assert_allclose(
        part_matrix(data, part, (outputs, inputs)), expected, rtol=0, atol=1e-6 * largest
    )


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_records_hold_what_their_parts_hold(data: st.DataObject) -> None:
    shapes = {"a": (data.draw(sizes), data.draw(sizes)), "b": (data.draw(sizes), data.draw(sizes))}
    one = st.one_of(
        st.builds(Part, st.sampled_from("ab"), st.just(SIGN), st.just(1), st.integers(1, 50)),
        st.builds(
            Part,
            st.sampled_from("ab"),
            st.just(LOW_RANK),
            st.sampled_from(LOW_RANK_BITS),
            st.integers(1, 9),
        ),
    )
    parts = tuple(data.draw(st.lists(one, min_size=1, max_size=5)))
    residual = Residual(0, 0, 0, parts)
    record = random_record(parts, shapes, 0, 0.1)
    offsets = residual.offsets(shapes)
    assert all(o % ALIGNMENT == 0 for o in offsets) and offsets[-1] == len(
        record
    ) == residual.nbytes(shapes)
    assert Residual.from_json(residual.to_json()) == residual
    found = matrices(residual, record, shapes)
    assert set(found) == {p.projection for p in parts}
    for name, matrix in found.items():
        expected = sum(
            part_matrix(record[start:], part, shapes[name])
            for part, start in zip(parts, offsets, strict=False)
            if part.projection == name
        )
        assert matrix.shape == shapes[name] and matrix.dtype == np.float32
        np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_parts_of_two_matrices_may_have_one_v() -> None:
    shapes = {"gate": (5, 9), "up": (4, 9), "down": (9, 5)}
    parts = (Part("gate", LOW_RANK, 4, 3), Part("up", LOW_RANK, 4, 3, 0))
    residual = Residual(0, 0, 0, parts)
    record = random_record(parts, shapes, 0, 0.1)
    assert Residual.from_json(residual.to_json()) == residual
    assert residual.to_json()[3] == [["gate", "low_rank", 4, 3], ["up", "low_rank", 4, 3, 0]]
    start = residual.offsets(shapes)[1]
    assert parts[1].nbytes((4, 9)) == 3 * (4 + 4) and start == 3 * (4 + 8 + 4)
    _, v, _ = unpack_low_rank(record, parts[0], (5, 9))
    scale, same, u = unpack_low_rank(record[start:], parts[1], (4, 9), record)
    np.testing.assert_array_equal(same, v)
    np.testing.assert_allclose(
        matrices(residual, record, shapes)["up"], (u * scale[:, None]).T @ v, rtol=1e-6
    )


@pytest.mark.parametrize(
    "parts",
    [
        (Part("up", LOW_RANK, 4, 3, 0),),
        (Part("gate", LOW_RANK, 4, 3), Part("up", LOW_RANK, 4, 2, 0)),
        (Part("gate", LOW_RANK, 8, 3), Part("up", LOW_RANK, 4, 3, 0)),
        (Part("gate", SIGN, 1, 3), Part("up", LOW_RANK, 4, 3, 0)),
        (Part("gate", LOW_RANK, 4, 3), Part("down", LOW_RANK, 4, 3, 0)),
        (
            Part("gate", LOW_RANK, 4, 3),
            Part("up", LOW_RANK, 4, 3, 0),
            Part("up", LOW_RANK, 4, 3, 1),
        ),
    ],
)
def test_a_v_that_is_not_there_is_refused(parts: tuple[Part, ...]) -> None:
    shapes = {"gate": (5, 9), "up": (4, 9), "down": (9, 5)}
    with pytest.raises(PlanError, match="is like part"):
        Residual(0, 0, 0, parts).offsets(shapes)


# Plans with residuals.

GOOD = Residual(1, 0, 1, (Part("gate", SIGN, 1, 1),))


def plan_with(*residuals: Residual) -> Plan:
    return replace(plan_round_robin([[1.0, 2.0]], ["a", "b"], 2), residuals=residuals)


def test_a_plan_knows_its_residuals() -> None:
    other = Residual(0, 0, 0, (Part("down", LOW_RANK, 4, 3), Part("down", SIGN, 1, 2)))
    plan = plan_with(GOOD, other)
    assert plan.residual_of(1, 0, 1) == 0 and plan.residual_of(0, 0, 0) == 1
    assert plan.residual_of(0, 0, 1) is None and plan.residual_of(1, 0, 0) is None
    assert Plan.from_json(plan.to_json()) == plan and plan != plan_with(GOOD)


@pytest.mark.parametrize(
    ("residuals", "message"),
    [
        ([replace(GOOD, tenant=2)], "which no copy serves"),
        ([replace(GOOD, tenant=-1)], "which no copy serves"),
        ([replace(GOOD, layer=1)], "which no copy serves"),
        ([replace(GOOD, expert=-1)], "which no copy serves"),
        (
            [GOOD, replace(GOOD, parts=(Part("down", SIGN, 1, 1),))],
            r"two residuals for .* \(1, 0, 1\)",
        ),
        ([replace(GOOD, parts=())], "has no parts"),
        (
            [replace(GOOD, parts=(Part("gate", "sparse", 1, 1),))],
            "kind 'sparse'; there is: sign, low_rank",
        ),
        ([replace(GOOD, parts=(Part("gate", SIGN, 2, 1),))], "kind sign with 2 bits"),
        ([replace(GOOD, parts=(Part("gate", LOW_RANK, 1, 1),))], "kind low_rank with 1 bits"),
        ([replace(GOOD, parts=(Part("gate", LOW_RANK, 3, 1),))], "kind low_rank with 3 bits"),
        ([replace(GOOD, parts=(Part("gate", LOW_RANK, 4, 0),))], "with size 0"),
        ([replace(GOOD, parts=(Part("gate", SIGN, 1, -2),))], "with size -2"),
    ],
)
def test_bad_residuals_are_refused(residuals: list[Residual], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_with(*residuals)


def test_a_miss_has_no_residual() -> None:
    with pytest.raises(PlanError, match="which no copy serves"):
        replace(plan_round_robin([[1.0, 2.0]], ["a", "b"], 1), residuals=(GOOD,))


@pytest.mark.parametrize(
    "value",
    [
        [1, 0, 1],
        [1, 0, 1, [["gate", "sign", 1]]],
        [1, 0, 1, 5],
        [1, 0, 1, [["gate", "sign", "x", 1]]],
        None,
    ],
)
def test_json_that_is_no_residual_is_refused(value: Any) -> None:
    good = plan_with(GOOD).to_json()
    assert Plan.from_json(good).residuals == (GOOD,)
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(good | {"residuals": [value]})


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        (Copy(0, 0, 0, (0.5, 0.5)), "mixes 2 tenants of 2"),
        (Copy(0, 0, MERGED, (1.0,)), "mixes 1 tenants of 2"),
        (Copy(0, 0, -3), "lies outside"),
        (Copy(0, 0, 2), "lies outside"),
    ],
)
def test_bad_merged_copies_are_refused(copy: Copy, message: str) -> None:
    plan = plan_with()
    merged = replace(plan, copies=(Copy(0, 0, MERGED, (0.25, 0.75)), *plan.copies[1:]))
    assert Plan.from_json(merged.to_json()) == merged and merged.owner.tolist() == [[MERGED, 1]]
    assert merged.weights_of(1, 0, 0) == MERGED
    with pytest.raises(PlanError, match=message):
        replace(plan, copies=(copy, *plan.copies[1:]))
