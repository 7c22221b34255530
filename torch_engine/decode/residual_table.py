"""Where the parts of residuals lie, as the kernels of decode steps read it."""

from __future__ import annotations

import torch

from common.plan.residual import SIGN
from torch_engine.experts.residuals import PROJECTIONS, ResidentResiduals


class ResidualTable:
    """Parts of all residuals of a pool.

    data: uint8, all records. parts: int64 [residuals, 3, most_parts, 5], see `kernels.residuals`.
    most_rank: of low-rank parts, at least 1.
    """

    def __init__(self, residuals: ResidentResiduals, device: torch.device):
        self.data = residuals.buffer
        each = [[item.parts[p] for p in PROJECTIONS] for item in residuals.items]
        self.most_parts = max((len(parts) for item in each for parts in item), default=1) or 1
        self.most_rank = 1
        table = torch.zeros(max(1, len(each)), 3, self.most_parts, 5, dtype=torch.int64)
        for i, item in enumerate(each):
            begin = int(residuals.items[i].data.storage_offset())
            shapes = residuals.items[i].shapes
            for projection, parts in enumerate(item):
                for number, (part, offset, v) in enumerate(parts):
                    u = 0
                    if part.kind != SIGN:
                        u = begin + offset + part.u_offset(shapes[part.projection][1])
                        self.most_rank = max(self.most_rank, part.size)
                    entry = (part.bits, part.size, begin + offset, begin + v, u)
                    table[i, projection, number] = torch.tensor(entry)
        self.parts = table.to(device)
