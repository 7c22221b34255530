"""Byte counts as people write them, and what counts as a whole number."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; True and False are none, though Python counts them among
    them."""
    return isinstance(value, int) and not isinstance(value, bool)


def parse_bytes(text: str) -> int:
    """Bytes of `60GiB`, `1.5 GB`, `4096`. Raises ValueError with the accepted forms."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(
            f"{text!r} is no size; write bytes or a number with KiB, MiB, GiB, KB, MB or GB"
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """`1.50 GiB`; whole bytes below 1 KiB."""
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.2f} {unit}"
