"""Residuals: small corrections that a tenant keeps beside a copy it shares, and how they lie in
memory.

A residual of a matrix is a sum of parts, each of one of two kinds:
- sign: one bit a weight and one scale for every few rows, `scale * (+1 or -1)` (BitDelta, arXiv
  2402.10193);
- low_rank: `sum_i scale_i u_i v_i^T`, with u and v in 2, 4, 8, 16 or 32 bits a number, so that
  large singular values can have more bits than small ones (Delta-CoMe, arXiv 2406.08903).

The parts of all matrices of one tenant's expert form one record: bytes, little endian, each part at
a multiple of 16. Rows of codes are padded with zeros to a multiple of 4 bytes. Code j of a row with
b bits a code begins at bit `j * b % 8` (from the lowest) of byte `j * b // 8`. N outputs, K inputs,
rank R:
- sign: scales bfloat16 [ceil(N / size)], padded to 4 bytes; codes [N][K], 1 bit: 1 is +, 0 is -.
- low_rank: scales float32 [R]; v [R][K], unless it is `like` another part, whose v is meant; u
  [R][N]. Up to 8 bits a code c stands for `c - (2^bits -
  1) / 2`; 16 bits are float16, 32 bits float32.
docs/store-format.md has the same with an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.dtypes import BFLOAT16
from common.errors import PlanError

SIGN, LOW_RANK = "sign", "low_rank"
KINDS = (SIGN, LOW_RANK)
LOW_RANK_BITS = (2, 4, 8, 16, 32)
ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """One term of a residual.

    bits: of one number: 1 for sign, one of `LOW_RANK_BITS`. size: rows that share a scale (sign),
        rank (low_rank). like: number of an earlier part of the record, of the same bits and size
        and of a projection with the same inputs, whose v this low-rank part has too.
    """

    projection: str
    kind: str
    bits: int
    size: int
    like: int | None = None

    def check(self) -> None:
        """Raises PlanError for what no engine can compute."""
        if self.kind not in KINDS:
            raise PlanError(f"residual part of kind {self.kind!r}; there is: {', '.join(KINDS)}")
        if self.bits not in ((1,) if self.kind == SIGN else LOW_RANK_BITS):
            raise PlanError(f"residual part of kind {self.kind} with {self.bits} bits")
        if self.size < 1:
            raise PlanError(f"residual part of kind {self.kind} with size {self.size}")
        if self.like is not None and self.kind != LOW_RANK:
            raise PlanError(f"residual part of kind {self.kind} that is like another")

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes for a matrix [out, in], without padding after it."""
        outputs, inputs = shape
        if self.kind == SIGN:
            return self.codes_offset(outputs) + outputs * row_bytes(inputs, 1)
        return self.u_offset(inputs) + self.size * row_bytes(outputs, self.bits)

    def codes_offset(self, outputs: int) -> int:
        """Where the codes of a sign part begin."""
        return _padded(2 * -(-outputs // self.size))

    @property
    def v_offset(self) -> int:
        """Where v begins in a low-rank part that has one."""
        return 4 * self.size

    def u_offset(self, inputs: int) -> int:
        """Where u begins in a low-rank part."""
        own = self.size * row_bytes(inputs, self.bits) if self.like is None else 0
        return self.v_offset + own


@dataclass(frozen=True)
class Residual:
    """What tenant number `tenant` adds to the copy that serves it at (layer, expert). Parts in the
    record's order."""

    tenant: int
    layer: int
    expert: int
    parts: tuple[Part, ...]

    def offsets(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Where each part begins in the record, and, last, the record's length in bytes."""
        found = [0]
        for number, part in enumerate(self.parts):
            if part.projection not in shapes:
                raise PlanError(
                    f"residual of projection {part.projection!r}; there is: {', '.join(shapes)}"
                )
            if part.like is not None:
                self._check_like(number, shapes)
            size = part.nbytes(shapes[part.projection])
            found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return found

    def _check_like(self, number: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        part, like = self.parts[number], self.parts[number].like
        other = self.parts[like] if like is not None and 0 <= like < number else None
        if (
            other is None
            or other.like is not None
            or (other.kind, other.bits, other.size) != (part.kind, part.bits, part.size)
            or shapes[other.projection][1] != shapes[part.projection][1]
        ):
            raise PlanError(
                f"part {number} of a residual is like part {like}, which is none before it with a "
                "v of its own, of the same bits, rank and inputs"
            )

    def nbytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self.offsets(shapes)[-1]

    def to_json(self) -> list[Any]:
        return [
            self.tenant,
            self.layer,
            self.expert,
            [
                [p.projection, p.kind, p.bits, p.size, *([] if p.like is None else [p.like])]
                for p in self.parts
            ],
        ]

    @classmethod
    def from_json(cls, value: Any) -> Residual:
        tenant, layer, expert, parts = value
        made = tuple(
            Part(role_of(str(p)), str(kind), int(bits), int(size), *map(int, like))
            for p, kind, bits, size, *like in parts
        )
        return cls(int(tenant), int(layer), int(expert), made)


# Names of projections in stores of format 1 and 2: those of Mixtral's and Switch's files.
_OLDER = {"w1": "gate", "w3": "up", "w2": "down"}
_OLDER |= {"wi_0": "gate", "wi_1": "up", "wi": "up", "wo": "down"}


def role_of(projection: str) -> str:
    """The role of a projection that a store names."""
    return _OLDER.get(projection, projection)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 4) * 4


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` numbers, padded to a multiple of 4."""
    return _padded(-(-count * bits // 8))


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers 0..2^bits - 1 [rows, count] as uint8 [rows, row_bytes]. bits: 1, 2, 4 or 8."""
    rows, count = codes.shape
    out = np.zeros((rows, row_bytes(count, bits)), dtype=np.uint8)
    per_byte = 8 // bits
    wide = np.zeros((rows, out.shape[1] * per_byte), dtype=np.uint8)
    wide[:, :count] = codes
    for i in range(per_byte):
        out |= wide[:, i::per_byte] << (i * bits)
    return out


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """What `pack_codes` packed: uint8 [rows, count]."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(len(packed), -1)[:, :count])


def pack_sign(scale: np.ndarray, positive: np.ndarray, size: int) -> np.ndarray:
    """scale: [ceil(N / size)], rounded to bfloat16; positive: bool [N, K]. Returns uint8
    [bytes]."""
    scales = np.zeros(_padded(2 * len(scale)) // 2, dtype=BFLOAT16)
    scales[: len(scale)] = scale.astype(BFLOAT16)
    if len(scale) != -(-len(positive) // size):
        raise ValueError(f"{len(scale)} scales for {len(positive)} rows, {size} to a scale")
    return np.concatenate(
        [scales.view(np.uint8), pack_codes(positive.astype(np.uint8), 1).reshape(-1)]
    )


def pack_low_rank(scale: np.ndarray, v: np.ndarray, u: np.ndarray, bits: int) -> np.ndarray:
    """scale: float32 [R]; v: [R, K], u: [R, N]: codes (integers) up to 8 bits, numbers above.
    Returns uint8 [bytes]."""

    def rows(values: np.ndarray) -> np.ndarray:
        if bits <= 8:
            return pack_codes(values.astype(np.uint8), bits)
        numbers = values.astype(np.float16 if bits == 16 else np.float32)
        out = np.zeros((len(numbers), row_bytes(numbers.shape[1], bits)), dtype=np.uint8)
        out[:, : numbers.shape[1] * bits // 8] = np.ascontiguousarray(numbers).view(np.uint8)
        return out

    return np.concatenate(
        [scale.astype(np.float32).view(np.uint8), rows(v).reshape(-1), rows(u).reshape(-1)]
    )


def join_parts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The record of parts as `pack_sign` and `pack_low_rank` give them, each padded to a multiple
    of 16 bytes."""
    return np.concatenate(
        [np.concatenate([p, np.zeros(-len(p) % ALIGNMENT, dtype=np.uint8)]) for p in parts]
        or [np.zeros(0, dtype=np.uint8)]
    )


def unpack_sign(
    data: np.ndarray, part: Part, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """scale float32 [N], one for each row, and positive bool [N, K], of a part that begins at
    data[0]."""
    outputs, inputs = shape
    count = -(-outputs // part.size)
    start = _padded(2 * count)
    scale = np.frombuffer(data[: 2 * count].tobytes(), dtype=BFLOAT16).astype(np.float32)
    width = row_bytes(inputs, 1)
    codes = data[start : start + outputs * width].reshape(outputs, width)
    return np.repeat(scale, part.size)[:outputs], unpack_codes(codes, 1, inputs).astype(bool)


def unpack_low_rank(
    data: np.ndarray, part: Part, shape: tuple[int, ...], like: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 scale [R], v [R, K], u [R, N], codes turned into the numbers that they stand for.

    like: uint8, where the part that this one is like begins, if it is like one.
    """
    outputs, inputs = shape

    def rows(data: np.ndarray, start: int, count: int) -> np.ndarray:
        width = row_bytes(count, part.bits)
        raw = data[start : start + part.size * width].reshape(part.size, width)
        if part.bits <= 8:
            return unpack_codes(raw, part.bits, count).astype(np.float32) - np.float32(
                (2**part.bits - 1) / 2
            )
        kind = np.float16 if part.bits == 16 else np.float32
        flat = np.frombuffer(np.ascontiguousarray(raw).tobytes(), dtype=kind)
        return flat.reshape(part.size, -1)[:, :count].astype(np.float32)

    scale = np.frombuffer(data[: 4 * part.size].tobytes(), dtype=np.float32)
    v = rows(data if like is None else like, part.v_offset, inputs)
    return scale, v, rows(data, part.u_offset(inputs), outputs)


def part_matrix(
    data: np.ndarray, part: Part, shape: tuple[int, ...], like: np.ndarray | None = None
) -> np.ndarray:
    """The part as float32 [out, in]. like: as for `unpack_low_rank`."""
    if part.kind == SIGN:
        scale, positive = unpack_sign(data, part, shape)
        return np.where(positive, scale[:, None], -scale[:, None])
    scale, v, u = unpack_low_rank(data, part, shape, like)
    return np.asarray((u * scale[:, None]).T @ v)


def matrices(
    residual: Residual, data: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """What a residual adds to each projection that it touches: float32 [out, in]. data: uint8, its
    record."""
    offsets = residual.offsets(shapes)
    if len(data) != offsets[-1]:
        raise PlanError(f"a residual's record has {len(data)} bytes, its parts need {offsets[-1]}")
    found: dict[str, np.ndarray] = {}
    for part, start in zip(residual.parts, offsets, strict=False):
        like = None if part.like is None else data[offsets[part.like] :]
        matrix = part_matrix(data[start:], part, shapes[part.projection], like)
        found[part.projection] = (
            found[part.projection] + matrix if part.projection in found else matrix
        )
    return found
