"""What both engines' own CPU kernels are compiled for, and the switch that turns them off."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineError

HEADERS = tuple(Path(__file__).with_name(name) for name in ("residuals.h", "vectors.h"))

SWITCH = "MOETEL_NATIVE"
"""The environment variable that says whether own kernels may be used: 1 (as if not set) or 0."""


@dataclass(frozen=True)
class Target:
    """The instructions that kernels are compiled for.

    name: as users know them. flags: for gcc and clang. bf16_products: whether they multiply
        bfloat16.
    """

    name: str
    flags: tuple[str, ...]
    bf16_products: bool = False


def switched_off() -> bool:
    """Whether the environment turns own kernels off. Raises EngineError for a value that is neither
    0 nor 1."""
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise EngineError(
            f"the environment has {SWITCH}={value!r}; use 1 (own CPU kernels where they work) or 0"
        )
    return value == "0"


def cpu_flags() -> frozenset[str]:
    """What the processor can do, in the words of Linux; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def find_target() -> Target | str:
    """What to compile for on this machine, or why there is nothing."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    flags = cpu_flags()
    if flags >= {"avx512f", "avx512bw", "avx2", "fma", "f16c"}:
        if "avx512_bf16" in flags:
            return Target("AVX-512 bf16", ("-march=native",), bf16_products=True)
        return Target("AVX-512", ("-march=native", "-DMOETEL_NO_BF16"))
    if flags >= {"avx2", "fma", "f16c"}:
        return Target("AVX2", ("-mavx2", "-mfma", "-mf16c", "-mtune=native"))
    return "the processor has neither AVX-512 (F, BW) nor AVX2 with FMA and F16C"


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Let one process at a time compile into a folder: the others wait, and find the library
    there."""
    import fcntl  # not on every system; kernels are for Linux

    directory = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
