"""Seconds of device work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Seconds of device work, with the device idle before and after."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Callable[[], Any]) -> float:
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def repeat(self, call: Callable[[], Any], repeats: int = 7) -> list[float]:
        self(call)
        return [self(call) for _ in range(repeats)]


def pinned(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(elements, dtype=dtype, pin_memory=device.type == "cuda")
