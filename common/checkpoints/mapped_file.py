"""Files mapped whole and read-only, that keep no file descriptor open.

numpy.memmap and mmap.mmap hold one descriptor a mapping, and a process may usually have 1,024:
fewer than a model has tensors. The kernel needs none once a file is mapped. It allows 65,530
mappings, so a file of many tensors is mapped once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
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

    def __init__(self, path: Path):
        assert _libc is not None
        self._address: int | None = None
        fd = os.open(path, os.O_RDONLY)
        try:
            self._length = os.fstat(fd).st_size
            address = _libc.mmap(None, self._length, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
        finally:
            os.close(fd)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._address = address
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (self._length,),
            "data": (address, True),  # read-only
        }

    def __del__(self) -> None:
        if self._address is not None and _libc is not None:
            _libc.munmap(self._address, self._length)
            self._address = None


class MappedFile:
    """A file that is mapped when it is first asked for, and as long as this or a view of it lives.

    What replaces the file later changes nothing of what was mapped.
    """

    def __init__(self, path: Path):
        self.path = path
        self._bytes: np.ndarray | None = None
        self._lock = threading.Lock()

    @property
    def is_mapped(self) -> bool:
        return self._bytes is not None

    def part(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], read-only; pages are read when touched. Raises OSError."""
        with self._lock:
            if self._bytes is None:
                if os.stat(self.path).st_size == 0:
                    self._bytes = np.empty(0, dtype=np.uint8)
                elif _libc is None:
                    self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
                else:
                    self._bytes = np.asarray(_Mapping(self.path))
        if offset + nbytes > len(self._bytes):
            raise OSError(f"the file ends before byte {offset + nbytes}")
        return self._bytes[offset : offset + nbytes]
