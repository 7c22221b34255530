"""A tenant's expert as another one with low-rank terms added, by the numbers of its adapter.

The terms lie in a record as a residual's do (`common.plan.residual`), so that a plan whose copy is
the other expert uses the record as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.plan.residual import LOW_RANK, Part, Residual, pack_low_rank


@dataclass(frozen=True)
class AdaptedExpert:
    """base: projection -> object id of the other expert. record: object id of the terms."""

    layer: int
    expert: int
    base: Mapping[str, str]
    parts: tuple[Part, ...]
    record: str

    @property
    def rank(self) -> int:
        """The largest of its projections."""
        ranks: dict[str, int] = {}
        for part in self.parts:
            ranks[part.projection] = ranks.get(part.projection, 0) + part.size
        return max(ranks.values())

    @property
    def object_ids(self) -> tuple[str, ...]:
        return (*self.base.values(), self.record)

    def residual(self, tenant: int) -> Residual:
        """What tenant number `tenant` adds to a copy that is `base`."""
        return Residual(tenant, self.layer, self.expert, self.parts)

    def to_json(self) -> list[Any]:
        _, layer, expert, parts = self.residual(0).to_json()
        return [layer, expert, dict(self.base), parts, self.record]

    @classmethod
    def from_json(cls, value: Any) -> AdaptedExpert:
        layer, expert, base, parts, record = value
        read = Residual.from_json([0, layer, expert, parts])
        return cls(read.layer, read.expert, dict(base), read.parts, str(record))


def pack_factors(
    projection: str, left: np.ndarray, right: np.ndarray, scaling: float, bits: int
) -> tuple[Part, np.ndarray]:
    """`scaling * left right` as a part and its bytes.

    left: float32 [out, rank]. right: float32 [rank, in]. bits: 32, or 16 for float16.
    Each row is brought to at most 1 by a power of two, which costs no digit: 32 bits hold the
    factors exactly, 16 bits those of bfloat16 and float16 but for numbers below 2^-14 of a row's
    largest.
    """
    u, u_scale = _to_one(left.T)
    v, v_scale = _to_one(right)
    scale = np.float32(scaling) * u_scale * v_scale
    return Part(projection, LOW_RANK, bits, len(right)), pack_low_rank(scale, v, u, bits)


def with_one_v(
    parts: Sequence[Part], packed: Sequence[np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Part], list[np.ndarray]]:
    """The same low-rank parts, each v kept once: an adapter of experts whose gate and up are one
    matrix has one for both."""
    found: list[Part] = []
    kept: list[np.ndarray] = []
    known: dict[tuple[int, int, bytes], int] = {}
    for number, (part, data) in enumerate(zip(parts, packed, strict=True)):
        u = part.u_offset(shapes[part.projection][1])
        key = part.bits, part.size, data[part.v_offset : u].tobytes()
        first = known.setdefault(key, number)
        if first != number:
            part = replace(part, like=first)
            data = np.concatenate([data[: part.v_offset], data[u:]])
        found.append(part)
        kept.append(data)
    return found, kept


def _to_one(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, n] over powers of two, and these, float32 [R]."""
    _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
    scale = np.exp2(exponents.astype(np.float32))
    return rows / scale[:, None], scale
