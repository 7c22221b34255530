"""Weights by their addresses."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_of(table, group, like):
    """The weights of a group, as a pointer to the type that `like` points to."""
    address = tl.multiple_of(tl.load(table + group), 16)
    return tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)
