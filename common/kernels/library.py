"""The kernels' C interface (`kernels.h`) in ctypes, on addresses: no framework."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from common.kernels.packed_weights import FIELDS

_int, _address = ctypes.c_int64, ctypes.c_void_p


class Threads(ctypes.Structure):
    """The caller's threads. run: address of a function, None for the calling thread alone."""

    _fields_ = (("run", _address), ("pool", _address), ("count", _int))


class ExpertsCall(ctypes.Structure):
    """`moetel_experts_call` of `kernels.h`, which explains the fields."""

    _fields_ = (
        *((name, _int) for name in ("x_type", "w_type", "activation", "gated")),
        *((name, _int) for name in ("tokens", "top_k", "inputs", "inner", "outputs")),
        *((name, _int) for name in ("slots", "numbers")),
        *((name, _address) for name in ("x", "chosen", "gates", "weights", "y", "scratch")),
        *((name, _address) for name in ("table", "records")),
        *((name, _int) for name in ("parts", "words")),
    )


@dataclass(frozen=True)
class Library:
    """The loaded functions. target: the instructions that they use, as users know them."""

    functions: ctypes.CDLL
    target: str

    def __post_init__(self) -> None:
        threads = ctypes.POINTER(Threads)
        linears = [threads, _int, _int, _address, _int, _int, _address, _int, _address, _address]
        norms = [threads, _int, _address, _int, _int, *[_address] * 4]
        attention = [threads, _int, _address, _int, _address, _address, _int, _address]
        attention += [*[_int] * 5, _address, _int, ctypes.c_float, _address]
        experts = [threads, ctypes.POINTER(ExpertsCall), _address]
        for name, arguments, result in (
            ("linears", linears, None),
            ("experts", experts, ctypes.c_int),
            ("rms_norms", norms, None),
            ("attention", attention, None),
        ):
            function = getattr(self.functions, f"moetel_{name}")
            function.argtypes, function.restype = arguments, result

    def experts(self, threads: Threads, call: ExpertsCall) -> None:
        """Raises ValueError for a table of residuals that names what is none."""
        bad = np.zeros(FIELDS, dtype=np.int32)
        if self.functions.moetel_experts(threads, call, bad.ctypes.data):
            raise ValueError(
                f"a residual's table has the part {bad.tolist()}, which is none, or lies outside "
                "the records"
            )
