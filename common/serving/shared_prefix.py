"""Requests that begin alike and come at the same time, as the answers of one with `n` do."""

from __future__ import annotations

from collections.abc import Mapping

from common.serving.backend import Part
from common.serving.request import Request


def waits_for_prefix(request: Request, parts: Mapping[Request, Part], block: int | None) -> bool:
    """Whether a request finds more of its beginning in the cache if it begins after this step.

    That is so if a part of the step computes the next block that it needs, for another request.

    Args:
        block: see `Backend.prefix_block`.
    """
    if block is None or request.sequence is not None or not request.shares_prefix:
        return False
    for other, part in parts.items():
        if not part.read or not other.shares_prefix or other.owner != request.owner:
            continue
        read = len(other.prompt) + len(other.token_ids) - other.unread
        end = (read // block + 1) * block
        computed = end <= read + part.read
        if computed and end < request.unread and other.first(end) == request.first(end):
            return True
    return False
