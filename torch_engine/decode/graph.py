"""What a decode step of so many rows works in, at fixed places, and its captured launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.families import Decoder
from torch_engine.decode.buffers import StepInputs, power_of_two
from torch_engine.experts.grouped_residuals import ResidualTable, RowTiles

PROGRAMS = 256  # of attention: about two a multiprocessor


class StepGraph:
    """Inputs and activations of a step. rows M, groups G: the most that it takes.

    x, normed, out: [M, H]; logits: [M, V]; winners: int64 [M]. keys, order, gates, inner and
    expert_out have a row for each of a token's experts. splits: parts of each row's keys.
    residuals: rows that share one; None: the step's tenants have none.
    """

    def __init__(
        self,
        shape: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        groups: int,
        max_blocks: int,
        max_slots: int,
        residuals: ResidualTable | None,
    ):
        self.rows, self.groups = rows, groups
        self.inputs = StepInputs(rows, max_blocks, device)
        a, top_k = shape.attention, shape.experts.router.top_k

        def zeros(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        self.x, self.normed, self.out = (zeros(rows, shape.hidden) for _ in range(3))
        self.qkv = zeros(rows, (a.heads + 2 * a.kv_heads) * a.head_dim)
        self.q, self.attended = (zeros(rows, a.heads * a.head_dim) for _ in range(2))
        self.splits = min(32, power_of_two(max(1, PROGRAMS // (rows * a.kv_heads))))
        self.parts = zeros(rows, a.heads, self.splits, a.head_dim, kind=torch.float32)
        self.part_logs = zeros(rows, a.heads, self.splits, kind=torch.float32)
        self.router = zeros(rows, shape.experts.count)
        self.keys, self.order = (zeros(rows * top_k, kind=torch.int32) for _ in range(2))
        self.gates = zeros(rows * top_k, kind=torch.float32)
        self.slot_starts = zeros(max_slots + 1, kind=torch.int32)
        self.inner = zeros(rows * top_k, shape.experts.inner)
        self.expert_out = zeros(rows * top_k, shape.hidden)
        self.numbers = zeros(rows * top_k, kind=torch.int32)
        self.residuals: RowTiles | None = None
        if residuals is not None:
            self.gate_up = zeros(rows * top_k, 2 * shape.experts.inner)
            self.residuals = RowTiles(residuals, rows * top_k, rows, residuals.most_groups(groups))
        self.logits = zeros(rows, shape.vocab_size)
        self.winners = zeros(rows, kind=torch.int64)
        self._captured: torch.cuda.CUDAGraph | None = None

    def launch(self, forward: Callable[[], None], memory: Any) -> None:
        """Compute the step, captured the first time. memory: what graphs share, of CUDA."""
        if not self.x.is_cuda:
            forward()
            return
        if self._captured is None:
            forward()  # compiles what is new; the graph computes the same once more
            torch.cuda.synchronize(self.x.device)
            captured = torch.cuda.CUDAGraph()
            # Other threads fetch experts meanwhile, which has nothing to do with this stream.
            with torch.cuda.graph(captured, pool=memory, capture_error_mode="thread_local"):
                forward()
            self._captured = captured
        self._captured.replay()
