"""What tenants add to copies that they share: residuals, kept packed on the device and expanded
while they are used.

Legend: rows M, inputs K, outputs N, rank R. Layout of the bytes: common/plan/residual.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.plan.residual import SIGN, Part, Residual, row_bytes
from common.store import Store
from torch_engine.experts.token_tenants import TokenTenants, groups_of, looked_up
from torch_engine.products import as_tensor

# Numbers that are expanded at once: 4 MiB of float32, beside megabytes that stay packed.
CHUNK = 1 << 20

PROJECTIONS = ("gate", "up", "down")


class AddedResiduals(Protocol):
    """What rows of a product add."""

    def add(self, projections: Sequence[str], x: Tensor, out: Tensor) -> None:
        """out [M, projections * N] += x [M, K] R^T."""


class HeldResiduals(Protocol):
    """All tenants' residuals on the device."""

    @property
    def nbytes(self) -> int: ...

    def close(self) -> None:
        """Drop the bytes."""


class PackedResidual:
    """What one tenant adds at one position. data: uint8 [bytes], its record on the device."""

    def __init__(self, residual: Residual, data: Tensor, shapes: dict[str, tuple[int, ...]]):
        self.data = data
        self.shapes = shapes
        # Of each part where it begins, and where its v does if it is a low-rank one.
        self.parts: dict[str, list[tuple[Part, int, int]]] = {p: [] for p in shapes}
        offsets = residual.offsets(shapes)
        for part, offset in zip(residual.parts, offsets, strict=False):
            v = part.v_offset + (offset if part.like is None else offsets[part.like])
            self.parts[part.projection].append((part, offset, v))

    def add(self, projection: str, x: Tensor, out: Tensor) -> None:
        """out [M, N] += x [M, K] R^T, computed in float32; out is rounded once more."""
        parts = self.parts[projection]
        if not parts:
            return
        sums = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        wide = x.float()
        for part, offset, v in parts:
            shape = self.shapes[projection]
            add_part(part, self.data[offset:], self.data[v:], shape, wide, sums)
        out += sums


def add_part(
    part: Part, data: Tensor, of_v: Tensor, shape: tuple[int, ...], x: Tensor, out: Tensor
) -> None:
    """out [M, N] += x [M, K] R^T in plain operations, a few rows of the part at a time.

    data, of_v: uint8, where the part begins, and v of a low-rank one. x, out: float32.
    """
    outputs, inputs = shape
    if part.kind == SIGN:
        count = -(-outputs // part.size)
        start = row_bytes(count, 16)
        scale = (
            data[: 2 * count]
            .view(torch.bfloat16)
            .float()[torch.arange(outputs, device=data.device) // part.size]
        )
        codes = _rows(data, start, outputs, inputs, 1)
        for first, stop in _chunks(outputs, inputs):
            signs = _numbers(codes[first:stop], 1, inputs).mul_(2.0)  # +-0.5 to +-1
            out[:, first:stop].addcmul_(x @ signs.T, scale[first:stop])
        return
    scale = data[: 4 * part.size].view(torch.float32)
    v = _rows(of_v, 0, part.size, inputs, part.bits)
    u = _rows(data, part.u_offset(inputs), part.size, outputs, part.bits)
    for first, stop in _chunks(part.size, max(inputs, outputs)):
        t = (x @ _numbers(v[first:stop], part.bits, inputs).T).mul_(scale[first:stop])
        out.addmm_(t, _numbers(u[first:stop], part.bits, outputs))


def _chunks(rows: int, width: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK // width)
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


def _rows(data: Tensor, start: int, rows: int, count: int, bits: int) -> Tensor:
    """uint8 [rows, row_bytes] of what begins at data[start]."""
    width = row_bytes(count, bits)
    return data[start : start + rows * width].view(rows, width)


def _numbers(packed: Tensor, bits: int, count: int) -> Tensor:
    """float32 [rows, count] of uint8 [rows, row_bytes]; up to 8 bits a code c stands for c -
    (2^bits - 1) / 2."""
    if bits > 8:
        return packed.view(torch.float16 if bits == 16 else torch.float32)[:, :count].float()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.view(len(packed), -1)[:, :count].float().sub_((2**bits - 1) / 2)


@dataclass(frozen=True)
class RowResidual:
    """A residual and the rows, sorted by copy and tenant, that it is for."""

    start: int
    stop: int
    residual: PackedResidual


def add_residuals(
    residuals: Sequence[RowResidual], projection: str, x: Tensor, out: Tensor
) -> None:
    """out [rows, N] += x [rows, K] R^T, each residual in its own rows."""
    for r in residuals:
        r.residual.add(projection, x[r.start : r.stop], out[r.start : r.stop])


@dataclass(frozen=True)
class ResidualRuns:
    """Residuals of rows, added in plain operations, one run after another."""

    runs: Sequence[RowResidual]

    def add(self, projections: Sequence[str], x: Tensor, out: Tensor) -> None:
        """out [M, projections * N] += x [M, K] R^T."""
        for name, part in zip(projections, out.chunk(len(projections), dim=-1), strict=True):
            add_residuals(self.runs, name, x, part)


def residuals_within(residuals: Sequence[RowResidual], start: int, stop: int) -> list[RowResidual]:
    """Those of the rows start..stop, counted from start."""
    return [
        replace(r, start=r.start - start, stop=r.stop - start)
        for r in residuals
        if start <= r.start < stop
    ]


class ResidentResiduals:
    """All tenants' residuals, packed, in one buffer on the device.

    numbers: int64 [layers, tenants, experts], 0 where a tenant adds nothing, else 1 + the index in
        `plan.residuals`. buffer: uint8, all records one after another.
    """

    def __init__(self, store: Store, device: torch.device):
        plan, shapes = store.plan, dict(store.experts.projections)
        self.numbers = np.zeros(
            (plan.num_layers, len(plan.tenants), plan.num_experts), dtype=np.int64
        )
        ends = np.cumsum([0, *(r.nbytes(shapes) for r in plan.residuals)])
        self.nbytes = int(ends[-1])
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self.items: list[PackedResidual] = []
        for i, residual in enumerate(plan.residuals):
            data = self.buffer[ends[i] : ends[i + 1]]
            data.copy_(as_tensor(store.residual_ref(i).map()))
            self.items.append(PackedResidual(residual, data, shapes))
            self.numbers[residual.layer, residual.tenant, residual.expert] = i + 1
        self._at = np.asarray(self.numbers.any(axis=2))

    def among(self, layer: int, tenant_ids: np.ndarray, single: int | None) -> bool:
        """Whether a tenant of a batch has any in this layer. tenant_ids: int64 [T]."""
        return bool(self.items) and bool(
            self._at[layer, tenant_ids if single is None else single].any()
        )

    def numbers_of(self, layer: int, ids: np.ndarray, tenants: TokenTenants) -> np.ndarray | None:
        """Which residual each row of routing has, int64 [T, K], 0 for none; None if no tenant has
        any in this layer."""
        if not self.among(layer, tenants.ids, tenants.single):
            return None
        return looked_up(self.numbers[layer], ids, tenants)

    def rows(self, numbers: np.ndarray, both: np.ndarray) -> list[RowResidual]:
        """Runs of rows with a residual.

        numbers: int64 [rows]. both: int64 [rows], sorted, equal in a run.
        """
        runs = groups_of(both)
        return [
            RowResidual(start, stop, self.items[int(numbers[start]) - 1])
            for _, start, stop in runs
            if numbers[start]
        ]

    def close(self) -> None:
        """Drop the bytes."""
        self.items.clear()
