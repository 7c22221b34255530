"""The instructions that the kernels are compiled for, and the switch that turns them off."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineError

SWITCH = "MOETEL_NATIVE"
"""The environment variable that says whether own kernels may be used: 1 (as if not set) or 0.

`avx2` and `avx512` (without products of bfloat16) choose what they are compiled for, for tests.
"""

AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw"}


@dataclass(frozen=True)
class Target:
    """name: as users know the instructions. flags: for gcc and clang."""

    name: str
    flags: tuple[str, ...]


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
    """What to compile for, or why there is nothing.

    Raises:
        EngineError: the environment's MOETEL_NATIVE is malformed.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1", "avx2", "avx512"):
        raise EngineError(
            f"the environment has {SWITCH}={wanted!r}; use 1 (own CPU kernels where they work), 0, "
            "avx2 or avx512"
        )
    if wanted == "0":
        return "they are switched off"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    flags = cpu_flags()
    if flags >= AVX512 and wanted != "avx2":
        if "avx512_bf16" in flags and wanted != "avx512":
            return Target("AVX-512 bf16", ("-march=native",))
        return Target("AVX-512", ("-march=native", "-DMOETEL_NO_BF16"))
    if flags >= AVX2 and wanted != "avx512":
        return Target("AVX2", ("-mavx2", "-mfma", "-mf16c", "-mtune=native"))
    return "the processor has neither AVX-512 (F, BW) nor AVX2 with FMA and F16C"
