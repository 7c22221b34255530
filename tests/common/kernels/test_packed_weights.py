"""The kernels' layout, place by place."""

from __future__ import annotations

import numpy as np
import pytest

from common.kernels.packed_weights import blocked_sign, pack, row_bytes, unpack


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (64, 8), (70, 5), (129, 3)])
@pytest.mark.parametrize("kind", [np.float32, np.uint16])
def test_each_weight_lies_at_its_place(outputs: int, inputs: int, kind: type) -> None:
    weight = np.arange(1, outputs * inputs + 1).reshape(outputs, inputs).astype(kind)
    packed, width = pack(weight), 2 if kind is np.uint16 else 1
    assert packed.shape == (-(-outputs // 64), -(-inputs // width), 64 * width)
    left = packed.copy()
    for n in range(outputs):
        for k in range(inputs):
            place = n // 64, k // width, width * (n % 64) + k % width
            assert packed[place] == weight[n, k]
            left[place] = 0
    assert not left.any(), "what pads blocks and pairs is zero"
    np.testing.assert_array_equal(unpack(packed, outputs, inputs), weight)


def test_a_stack_is_packed_one_by_one() -> None:
    stack = np.random.default_rng(0).standard_normal((3, 2, 66, 7)).astype(np.float32)
    packed = pack(stack)
    np.testing.assert_array_equal(packed[2, 1], pack(stack[2, 1]))
    np.testing.assert_array_equal(unpack(packed, 66, 7), stack)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (70, 37), (3, 130)])
def test_each_sign_is_a_bit_of_its_outputs_block(outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(outputs)
    positive = rng.integers(0, 2, (outputs, inputs), dtype=np.uint8)
    size = 16
    scales = rng.integers(0, 256, row_bytes(-(-outputs // size), 16), dtype=np.uint8)
    rows = np.zeros((outputs, row_bytes(inputs, 1)), dtype=np.uint8)
    bits = np.packbits(positive, axis=1, bitorder="little")
    rows[:, : bits.shape[1]] = bits
    data = np.concatenate([scales, rows.reshape(-1)])
    found = blocked_sign(data, size, (outputs, inputs))
    np.testing.assert_array_equal(found[: len(scales)], scales)
    words = found[len(scales) :].copy().view("<u8").reshape(-(-outputs // 64), inputs)
    for n in range(outputs):
        mine = (words[n // 64] >> np.uint64(n % 64)) & np.uint64(1)
        np.testing.assert_array_equal(mine, positive[n])
