"""Copies of experts from the host to the device, through pinned buffers and on a stream of their
own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fill(gate_up: Tensor, down: Tensor, copy: dict[str, Tensor]) -> None:
    """Put a copy's matrices into its place in a pool: [2I, H] and [H, I]."""
    inter = len(gate_up) // 2
    gate_up[:inter].copy_(copy["gate"])
    gate_up[inter:].copy_(copy["up"])
    down.copy_(copy["down"])


class Staging:
    """Two pinned host buffers of one copy each, one filled while the other is sent, and a stream
    for their copies."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device):
        self._device = device
        self._buffers = [torch.empty(elements, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._stream = torch.cuda.Stream(device)
        self._turn = 0

    def views(self, gate_up: torch.Size, down: torch.Size) -> tuple[Tensor, Tensor]:
        """Places to fill, free again once their last copy has left."""
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        buffer = self._buffers[self._turn]
        return buffer[: gate_up.numel()].view(gate_up), buffer[gate_up.numel() :].view(down)

    def send(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event
    ) -> torch.cuda.Event:
        """Copy host to device on the own stream, once `after` has come. When they have arrived."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for host, device in pairs:
                device.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent[self._turn] = event
        return event
