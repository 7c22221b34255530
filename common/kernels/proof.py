"""Trial products: kernels whose numbers differ from numpy's are not used."""

from __future__ import annotations

import numpy as np

from common.dtypes import BFLOAT16
from common.kernels.library import ExpertsCall, Library, Threads
from common.kernels.packed_weights import (
    ACTIVATIONS,
    FIELDS,
    TYPES,
    blocked_part,
    pack,
    part_fields,
)

_TYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
_PAIRS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
TOKENS, TOP_K, INPUTS, INNER, SLOTS = 9, 2, 71, 100, 2


def proves_right(library: Library, threads: Threads) -> bool:
    """Whether products, and a layer of gated experts with residuals, equal numpy's."""
    rng = np.random.default_rng(0)
    shapes = ((INNER, INPUTS), (INNER, INPUTS), (INPUTS, INNER))
    weights = [
        [rng.standard_normal(shape).astype(np.float32) / 8 for shape in shapes]
        for _ in range(SLOTS)
    ]
    x = rng.standard_normal((TOKENS, INPUTS)).astype(np.float32)
    gates = rng.random((TOKENS, TOP_K)).astype(np.float32)
    records, table, dense = _residuals(rng, shapes)
    chosen = rng.integers(-1, 2 * SLOTS, (TOKENS, TOP_K)).astype(np.int32)
    chosen[0] = SLOTS, SLOTS + 1  # slot 0 with its residual, slot 1 that has none
    linear = x @ weights[0][0].T
    whole = np.zeros((TOKENS, INPUTS), np.float32)
    for t, i in np.argwhere(chosen >= 0):
        more = dense if chosen[t, i] == SLOTS else [np.zeros(s, np.float32) for s in shapes]
        gate, up, down = (w + r for w, r in zip(weights[chosen[t, i] % SLOTS], more, strict=True))
        inner = x[t] @ gate.T
        whole[t] += gates[t, i] * ((inner / (1 + np.exp(-inner)) * (x[t] @ up.T)) @ down.T)
    for x_type, w_type in _PAIRS:
        packed = [[pack(w.astype(_TYPES[w_type])) for w in slot] for slot in weights]
        pointers = np.array([[w.ctypes.data for w in slot] for slot in packed], dtype=np.uint64)
        typed = x.astype(_TYPES[x_type])
        found = [np.zeros((TOKENS, n), _TYPES[x_type]) for n in (INNER, INPUTS)]
        starts = np.array([0, TOKENS], dtype=np.int64)
        kinds = TYPES[x_type], TYPES[w_type]
        library.functions.moetel_linears(
            threads, *kinds, typed.ctypes.data, INPUTS, 1, pointers.ctypes.data, INNER,
            starts.ctypes.data, found[0].ctypes.data,
        )  # fmt: skip
        scratch = np.zeros(TOKENS * TOP_K * (INNER + INPUTS), dtype=np.float32)
        library.experts(
            threads,
            ExpertsCall(
                *kinds, ACTIVATIONS["silu"], True, TOKENS, TOP_K, INPUTS, INNER, INPUTS, SLOTS,
                2 * SLOTS, typed.ctypes.data, chosen.ctypes.data, gates.ctypes.data,
                pointers.ctypes.data, found[1].ctypes.data, scratch.ctypes.data,
                table.ctypes.data, records.ctypes.data, table.shape[2], len(records) // 4,
            ),
        )  # fmt: skip
        tolerance = 1e-5 if x_type == w_type == "float32" else 0.02
        exact: tuple[np.ndarray, np.ndarray] = linear, whole
        for one, other in zip(found, exact, strict=True):
            difference = np.abs(np.asarray(one, np.float32) - other).max()
            if not difference <= tolerance * np.abs(other).max():
                return False
    return True


def _residuals(
    rng: np.random.Generator, shapes: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Records, a table in which number `SLOTS` has a sign and a low-rank part beside each matrix,
    and these as matrices."""
    table = np.zeros((2 * SLOTS, len(shapes), 2, FIELDS), np.int32)
    records = np.zeros(0, np.uint8)
    dense = []
    for place, (outputs, inputs) in enumerate(shapes):
        scale = np.full((-(-outputs // 3) + 1) // 2 * 2, 0.0625, np.float32).astype(BFLOAT16)
        signs = rng.random((outputs, -(-inputs // 32) * 32)) < 0.5
        signs[:, inputs:] = False
        sign = np.concatenate(
            [scale.view(np.uint8), np.packbits(signs, axis=1, bitorder="little").reshape(-1)]
        )
        sizes = np.full(5, 1e-5, np.float32)
        v, u = (rng.integers(0, 256, (5, -(-n // 4) * 4), np.uint8) for n in (inputs, outputs))
        low_rank = np.concatenate([p.reshape(-1).view(np.uint8) for p in (sizes, v, u)])
        for i, (kind, bits, size, data) in enumerate(
            (("sign", 1, 3, sign), ("low_rank", 8, 5, low_rank))
        ):
            starts = [len(records) // 4]
            table[SLOTS, place, i] = part_fields(kind, bits, size, inputs, starts, None)
            records = np.concatenate([records, blocked_part(data, kind, size, shapes[place])])
        numbers = [codes[:, :n] - np.float32(127.5) for codes, n in ((v, inputs), (u, outputs))]
        dense.append(
            np.where(signs[:, :inputs], 0.0625, -0.0625) + (numbers[1].T * 1e-5) @ numbers[0]
        )
    return records, table, [d.astype(np.float32) for d in dense]
