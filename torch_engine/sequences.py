"""Sequences that are being answered, and the segments that a step makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from common.serving.backend import Part, Row
from common.serving.block_pool import Prefix
from torch_engine.layers.cache import BLOCK, Arena, Blocks
from torch_engine.segments import Chunk, Segment, Singles
from torch_engine.tenants.weights import TenantWeights


@dataclass
class CachedSequence:
    """tokens: all of them; `length` are in the cache, and `unread` of the others are to be read
    before the next one comes. limit: the most that the cache can come to hold of it.
    prefix: by which its blocks are found again; None: they are not.
    """

    tenant: str
    tokens: list[int]
    unread: int
    limit: int
    length: int = 0
    blocks: Blocks = field(default_factory=Blocks)
    prefix: Prefix | None = None

    @classmethod
    def of(cls, row: Row) -> CachedSequence:
        """A request, nothing of it read."""
        limit = len(row.prompt) + max(row.max_new_tokens, len(row.answer))
        return cls(row.tenant, [*row.prompt, *row.answer], row.unread, limit)

    def find(self, cache: Arena, salt: str) -> None:
        """Begin with what is in the cache already; its last token is read in any case."""
        self.prefix = cache.pool.prefix(self.tenant, salt)
        if self.prefix is None:
            return
        for block in cache.pool.find(self.prefix, self.tokens[:-1]):
            self.blocks.add(block)
        self.length = self.blocks.count * BLOCK
        self.unread -= self.length

    def keep(self, cache: Arena) -> None:
        """Let others find what was computed of it."""
        if self.prefix is not None:
            cache.pool.keep(self.prefix, self.tokens, self.length, self.blocks.table)

    def take(self, part: Part) -> list[int]:
        """The tokens that a part of a step adds to the cache."""
        if not part.read:
            self.tokens.append(part.token_id)
        self.unread -= part.read
        first, self.length = self.length, self.length + (part.read or 1)
        return self.tokens[first : self.length]


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
