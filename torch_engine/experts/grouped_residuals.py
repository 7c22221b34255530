"""Residuals for rows that are sorted by slot and residual, by Triton kernels, without the host.

Legend: rows M, inputs K, outputs N.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.plan.residual import SIGN
from torch_engine.experts.residuals import PROJECTIONS, ResidentResiduals

STAGES = (("gate", "up"), ("down",))  # projections of the same inputs

# How programs are cut, by the rows of a tile: outputs, inputs and ranks at once. In `expand` each
# thread unpacks a word of signs. No card has timed these cuts; all compile without spills.
EXPAND = {
    16: {"BN": 32, "BK": 128, "BR": 16, "num_warps": 4, "num_stages": 4},
    32: {"BN": 32, "BK": 128, "BR": 16, "num_warps": 4, "num_stages": 3},
    64: {"BN": 64, "BK": 128, "BR": 16, "num_warps": 8, "num_stages": 3},
}
SHRINK = {
    16: {"BK": 128, "BR": 16, "num_warps": 4, "num_stages": 3},
    32: {"BK": 64, "BR": 32, "num_warps": 8, "num_stages": 3},
    64: {"BK": 64, "BR": 32, "num_warps": 8, "num_stages": 3},
}
PROGRAMS = 128  # of `shrink` at the least: with fewer, inputs are split among more
MOST_CUT = 1024  # rows that are cut into tiles at once


class ResidualTable:
    """Where the parts of all residuals of a pool lie, of which there is one at least.

    data: uint8, all records. parts: int64 [residuals, 3, most_parts, FIELDS], see
        `residual_kernels`. most_rank: of low-rank parts; 0: there are none.
    columns: float32 numbers that low-rank parts need of a row.
    counts: int64 [layers, tenants], how many residuals there are.
    """

    def __init__(self, residuals: ResidentResiduals, device: torch.device):
        from torch_engine.experts.residual_kernels import FIELDS  # late: triton is an option

        self.data = residuals.buffer
        self.counts = (residuals.numbers != 0).sum(axis=2)
        each = [len(parts) for item in residuals.items for parts in item.parts.values()]
        self.most_parts = max(1, *each)
        self.most_rank, self.columns = 0, 1
        size = len(residuals.items), len(PROJECTIONS), self.most_parts, FIELDS.value
        table = np.zeros(size, dtype=np.int64)
        for line, item in zip(table, residuals.items, strict=True):
            begin = int(item.data.storage_offset())
            for stage in STAGES:
                of_v: dict[int, int] = {}  # parts that are like others share their coefficients
                columns = 0
                for name in stage:
                    for number, (part, offset, v) in enumerate(item.parts[name]):
                        at, u, first, fills = begin + offset, 0, 0, 0
                        if part.kind == SIGN:
                            codes = at + part.codes_offset(item.shapes[name][0])
                        else:
                            codes, u = begin + v, at + part.u_offset(item.shapes[name][1])
                            fills = int(v not in of_v)
                            first = of_v.setdefault(v, columns)
                            columns += fills * part.size
                            self.most_rank = max(self.most_rank, part.size)
                        fields = (part.bits, part.size, at, codes, u, first, fills)
                        line[PROJECTIONS.index(name), number] = fields
                self.columns = max(self.columns, columns)
        self.parts = torch.from_numpy(table).to(device)

    def most_groups(self, tenants: int) -> int:
        """The most residuals that so many tenants have in one layer."""
        return int(np.sort(self.counts, axis=1)[:, -tenants:].sum(axis=1).max())


class RowTiles:
    """Tiles of rows that share a residual, and what their parts of low rank need.

    A tile has at most `BM` rows. That is four times what a residual has on average: most have one
    tile, so their codes are read once.

    Args:
        rows: how many, each for one of a token's experts.
        tokens: the most rows that one residual can have.
        groups: the most residuals that they can have together.
    """

    def __init__(self, table: ResidualTable, rows: int, tokens: int, groups: int):
        device = table.data.device
        self.table, self.rows = table, rows
        groups = max(1, min(rows, groups))
        wanted = min(tokens, 4 * -(-rows // groups), 64)
        self.most = max(16, 1 << (wanted - 1).bit_length())
        count = groups if tokens <= self.most else min(rows, groups + rows // self.most)
        self.tiles = torch.empty(count, 3, dtype=torch.int32, device=device)
        ranks = max(1, -(-table.most_rank // SHRINK[self.most]["BR"]))
        self.splits = 1 << min(3, (PROGRAMS // (count * ranks)).bit_length())
        sizes = self.splits, rows, table.columns
        self.split_coefficients = torch.empty(sizes, dtype=torch.float32, device=device)
        self.coefficients = self.split_coefficients[0]
        if self.splits > 1:
            self.coefficients = torch.empty_like(self.coefficients)
        self._order: Tensor | None = None

    def cut(self, numbers: Tensor, order: Tensor | None, total: Tensor) -> None:
        """Cut the rows into tiles.

        numbers: integers [M], 1 + the residual of each row, 0 for none; order: int32 [M], rows as
        sorted by slot and number, None if they lie sorted; total: int32 [1], how many count.
        """
        from torch_engine.experts.residual_kernels import tile_rows

        self._order = order
        block = min(MOST_CUT, 1 << (self.rows - 1).bit_length())
        tile_rows[(1,)](
            numbers,
            numbers if order is None else order,
            total,
            self.tiles,
            len(self.tiles),
            ORDERED=order is not None,
            BM=self.most,
            BLOCK=max(2, block),
            num_warps=4,
        )

    def add(self, projections: Sequence[str], x: Tensor, out: Tensor, share: int = 1) -> None:
        """out [M, projections * N] += x R^T, computed in float32 and rounded once.

        x: [M / share, K], a row of which is for `share` rows that follow one another unsorted.
        projections: one of `STAGES`.
        """
        from torch_engine.experts.residual_kernels import expand, shrink

        assert x.is_contiguous() and out.is_contiguous() and tuple(projections) in STAGES
        table, inputs, count = self.table, x.shape[1], len(projections)
        outputs = out.shape[1] // count
        of = table.data, table.parts, self.tiles
        order = self.tiles if self._order is None else self._order
        same = {
            "FIRST": PROJECTIONS.index(projections[0]),
            "PARTS": table.most_parts,
            "SHARE": share,
            "ORDERED": self._order is not None,
            "EXACT": x.dtype == torch.float32 or not x.is_cuda,
            "BM": self.most,
        }
        if table.most_rank:
            cut = SHRINK[self.most]
            ranks = -(-table.most_rank // cut["BR"])
            parts = count * table.most_parts * self.splits
            shrink[(ranks, len(self.tiles), parts)](
                x,
                *of,
                order,
                self.split_coefficients,
                inputs,
                self.rows,
                table.columns,
                SPLITS=self.splits,
                **same,
                **cut,
            )
            if self.splits > 1:
                torch.sum(self.split_coefficients, dim=0, out=self.coefficients)
        cut = EXPAND[self.most]
        expand[(-(-outputs // cut["BN"]), len(self.tiles), count)](
            x,
            out,
            *of,
            order,
            self.coefficients,
            outputs,
            inputs,
            table.columns,
            COUNT=count,
            **same,
            **cut,
        )
