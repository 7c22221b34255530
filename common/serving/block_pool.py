"""Which blocks of a cache are free, which sequences have the others, and what can be found in them.

A full block is known by the digest of the tokens in it and of all before them, as in vLLM's prefix
caching. The digests of a sequence begin with whose it is, so tenants never share a block. Nothing
is ever written into a block that is known.

Nothing here knows a tensor: a block is a number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np


@dataclass
class Prefix:
    """The digests of a sequence's full blocks, as far as they are known.

    root: what the first one goes on from. version: of what the pool knows, when it was begun.
    """

    root: bytes
    version: int
    digests: list[bytes] = field(default_factory=list)

    def next(self, tokens: Sequence[int]) -> bytes:
        """The digest of the block behind those that are known, which holds these tokens."""
        before = self.digests[-1] if self.digests else self.root
        return sha256(before + np.array(tokens, dtype=np.int64).tobytes()).digest()


class BlockPool:
    """Blocks of `block_size` tokens.

    enable_prefix_caching: whether blocks that nobody has any more can be found again. They are
        taken for something else when no other block is free, least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._users = [0] * num_blocks
        # Last freed, first used: those pages are in memory already.
        self._empty = list(range(num_blocks))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._version = 0

    @property
    def free(self) -> int:
        """Blocks that nobody has: empty ones, and those that could be found again."""
        return len(self._empty) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that nobody has and that can be found again."""
        return len(self._idle)

    def take(self) -> int:
        """A block to write into. There must be one: see `free`."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._blocks[self._digests.pop(block)]
        self._users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Take a sequence's blocks back, in its order."""
        # Last ones first: without the blocks before it a block cannot be found, so it goes first.
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._digests:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def prefix(self, tenant: str, salt: str = "") -> Prefix | None:
        """Of a new sequence; None: blocks are not found again.

        salt: sequences with another one share no blocks either (vLLM's `cache_salt`).
        """
        if not self.enable_prefix_caching:
            return None
        root = sha256(repr((tenant, salt, self._version)).encode()).digest()
        return Prefix(root, self._version)

    def find(self, prefix: Prefix, tokens: Sequence[int]) -> list[int]:
        """Blocks that hold the beginning of these tokens; they are the sequence's from now on.

        They must go back through `release`.
        """
        found: list[int] = []
        size = self.block_size
        for start in range(0, len(tokens) - size + 1, size):
            digest = prefix.next(tokens[start : start + size])
            block = self._blocks.get(digest)
            if block is None:
                break
            prefix.digests.append(digest)
            found.append(block)
            self._users[block] += 1
            self._idle.pop(block, None)
        return found

    def keep(
        self,
        prefix: Prefix,
        tokens: Sequence[int],
        length: int,
        blocks: Sequence[int] | np.ndarray,
    ) -> None:
        """Let a sequence's full blocks be found.

        length: how many of its tokens were computed. blocks: where they lie.
        """
        if prefix.version != self._version:
            return
        size = self.block_size
        for i in range(len(prefix.digests), length // size):
            digest = prefix.next(tokens[i * size : (i + 1) * size])
            prefix.digests.append(digest)
            # Two sequences may have computed the same; one of the blocks is enough.
            if digest not in self._blocks:
                block = int(blocks[i])
                self._blocks[digest], self._digests[block] = block, digest

    def forget(self) -> None:
        """Let no block be found any more: what they hold would be computed otherwise now."""
        self._version += 1
        self._blocks.clear()
        self._digests.clear()
        self._empty += self._idle
        self._idle.clear()
