"""What the machine decides: device, type of numbers, how matrices are kept, room for caches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import EngineError
from common.families import Decoder
from common.store import Store
from torch_engine import native
from torch_engine.tenants.tenant_buffer import FlatLayout

# What caches take unless `kv_cache_bytes` says otherwise: of what is free once weights are loaded,
# and on a CPU at most this many bytes.
CPU_CACHE_SHARE, CPU_CACHE_BYTES = 0.25, 4 << 30
CUDA_CACHE_SHARE = 0.8  # the rest is for activations
# What ready tenants take of the memory that is free beside the pool.
CUDA_READY_SHARE = 0.5


def prepare(device: torch.device) -> None:
    """Settings of torch for a device.

    cuDNN plans its attention anew for every length, which takes up to tenths of a second; the other
    implementations do not.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def why_no_triton(device: torch.device) -> str | None:
    """What keeps Triton's kernels from a device, in words."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if device.type != "cuda":
            return f"the device is {device}"
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
            return "the device is older than sm_80, or not of CUDA"
    return None


def ready_that_fit(
    shapes: Sequence[Decoder], dtype: torch.dtype, device: torch.device
) -> int | None:
    """The most tenants whose non-expert weights are kept on the device; None, as on a CPU: all.

    On a card as many of a store's as fit, and two at least: one computes while another comes.
    """
    if device.type == "cpu":
        return None
    one = max(FlatLayout.of(shape).elements for shape in shapes) * dtype.itemsize
    room = CUDA_READY_SHARE * torch.cuda.mem_get_info(device)[0]
    return max(2, min(len(shapes), int(room / one)))


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise EngineError(
            f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices, "
            "use cpu"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def find_dtype(wanted: str, store: Store, device: torch.device) -> torch.dtype:
    name = store.dtype if wanted == "auto" else wanted
    if name == "float16" and device.type == "cpu":
        if wanted != "auto":
            raise EngineError(
                "float16 is not computed on a CPU; use float32 (which holds every float16 value) "
                "or bfloat16"
            )
        name = "float32"
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def choose_products(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """The first of native and plain that works for this type on this device, if none is asked
    for."""
    works = ["plain"]
    if device.type == "cpu" and native.load(dtype) is not None:
        works.insert(0, "native")
    if wanted not in ("auto", *works):
        raise EngineError(
            f"products={wanted!r} does not work for {dtype} on {device} here; use auto or "
            f"{works[0]}"
        )
    return works[0] if wanted == "auto" else wanted


def products_name(products: str, dtype: torch.dtype) -> str:
    """Who multiplies, as `stats` says it."""
    if products == "native":
        kernels = native.load(dtype)
        assert kernels is not None
        return f"own kernels ({kernels.target})"
    return "torch"


def free_cache_bytes(device: torch.device) -> int:
    """What caches may take of the memory that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(CUDA_CACHE_SHARE * free)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return CPU_CACHE_BYTES
    return min(CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * available))
