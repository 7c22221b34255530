"""Read-only views of file ranges that keep no file descriptor open.

numpy.memmap and mmap.mmap hold one descriptor a mapping, and a process may usually have 1,024:
fewer than a model has tensors. The kernel needs none once a range is mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_libc: ctypes.CDLL | None
try:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
except (AttributeError, OSError, TypeError):  # Windows
    _libc = None

_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """Owns a mapping; numpy keeps it alive as the base of the arrays made from it."""

    def __init__(self, path: Path, offset: int, nbytes: int):
        assert _libc is not None
        self._address: int | None = None
        lead = offset % mmap.ALLOCATIONGRANULARITY
        self._length = nbytes + lead
        fd = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size < offset + nbytes:
                raise OSError(f"the file ends before byte {offset + nbytes}")
            address = _libc.mmap(
                None, self._length, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, offset - lead
            )
        finally:
            os.close(fd)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._address = address
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address + lead, True),  # read-only
        }

    def __del__(self) -> None:
        if self._address is not None and _libc is not None:
            _libc.munmap(self._address, self._length)
            self._address = None


def map_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """uint8 [nbytes], read-only; pages are read when touched; mapped as long as the array lives.
    Raises OSError."""
    if nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    if _libc is None:
        return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(nbytes,))
    return np.asarray(_Mapping(path, offset, nbytes))
