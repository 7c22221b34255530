"""Sequences that are being answered, and the segments that a step makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from common.serving.backend import Part, Row
from torch_engine.layers.cache import Arena, Blocks
from torch_engine.segments import Chunk, Segment, Singles
from torch_engine.tenants.weights import TenantWeights


@dataclass
class CachedSequence:
    """tokens: prompt and, after a preemption, answer; `unread` of them are not in the cache yet.
    length: tokens in the
    cache. limit: the most that it can come to hold."""

    tenant: str
    tokens: tuple[int, ...]
    unread: int
    limit: int
    length: int = 0
    blocks: Blocks = field(default_factory=Blocks)

    @classmethod
    def of(cls, row: Row) -> CachedSequence:
        """A request, nothing of it read."""
        limit = len(row.prompt) + max(row.max_new_tokens, len(row.answer))
        return cls(row.tenant, (*row.prompt, *row.answer), row.unread, limit)

    def take(self, part: Part) -> tuple[int, ...]:
        """The tokens that a part of a step adds, which are the sequence's from now on."""
        count = part.read or 1
        self.length += count
        if not part.read:
            return (part.token_id,)
        done = len(self.tokens) - self.unread
        self.unread -= count
        return self.tokens[done : done + count]


def segment_of(
    tenant_index: int,
    weights: TenantWeights,
    start: int,
    parts: Sequence[tuple[CachedSequence, Part]],
    cache: Arena,
    device: torch.device,
) -> Segment:
    """Take the parts' tokens into their sequences, with room in the cache. Parts of single tokens
    come first.

    start: of the segment among the step's tokens.
    """
    ids: list[int] = []
    positions, places = [], []
    blocks, lengths, chunks = [], [], []
    for sequence, part in parts:
        first = sequence.length
        new = sequence.take(part)
        cache.reserve(sequence.blocks, sequence.length)
        if part.read:
            known = sequence.blocks.places(0, sequence.length) if first else None
            before = None if known is None else torch.from_numpy(known).to(device)
            chunks.append(Chunk(len(ids), len(ids) + len(new), first, before))
        else:
            blocks.append(sequence.blocks)
            lengths.append(sequence.length)
        ids += new
        positions.append(np.arange(first, sequence.length))
        places.append(sequence.blocks.places(first, sequence.length))
    at = np.concatenate(positions)
    return Segment(
        tenant_index=tenant_index,
        weights=weights,
        start=start,
        stop=start + len(ids),
        token_ids=torch.tensor(ids, dtype=torch.int64).to(device),
        positions=torch.from_numpy(at).to(device),
        places=torch.from_numpy(np.concatenate(places)).to(device),
        last=int(at.max()),
        singles=Singles(blocks, np.array(lengths, dtype=np.int64)) if blocks else None,
        chunks=chunks,
    )


def whole_prompts(
    tenant_index: int, weights: TenantWeights, rows: Sequence[Sequence[int]], device: torch.device
) -> Segment:
    """A segment of prompts whose keys are not kept."""
    stops = np.cumsum([len(r) for r in rows]).tolist()
    positions = np.concatenate([np.arange(len(r)) for r in rows])
    ids = np.concatenate([np.array(r, dtype=np.int64) for r in rows])
    return Segment(
        tenant_index=tenant_index,
        weights=weights,
        start=0,
        stop=len(ids),
        token_ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        places=None,
        last=int(positions.max()),
        singles=None,
        chunks=[Chunk(stop - len(r), stop, 0, None) for stop, r in zip(stops, rows, strict=True)],
    )
