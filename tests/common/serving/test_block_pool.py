"""Blocks that sequences share, leave behind and find again."""

from __future__ import annotations

import random

import pytest

from common.serving.block_pool import BlockPool
from tests.common.serving.requests import check_integrity

SIZE = 4


def write(pool: BlockPool, tokens: list[int], tenant: str = "a") -> tuple[list[int], int]:
    """A sequence that is computed: its blocks, and how many of them were found."""
    prefix = pool.prefix(tenant)
    assert prefix is not None
    blocks = pool.find(prefix, tokens)
    found = len(blocks)
    blocks += [pool.take() for _ in range(-(-len(tokens) // SIZE) - found)]
    pool.keep(prefix, tokens, len(tokens), blocks)
    return blocks, found


def test_full_blocks_are_found_with_all_that_stands_before_them() -> None:
    pool = BlockPool(8, SIZE)
    blocks, _ = write(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    pool.release(blocks)
    assert (pool.free, pool.cached) == (8, 2)
    assert write(pool, [1, 2, 3, 4, 5, 6, 7, 8, 10]) == ([*blocks[:2], blocks[2]], 2)
    assert write(pool, [9, 9, 9, 9, 5, 6, 7, 8])[1] == 0
    assert write(pool, [1, 2, 3])[1] == 0
    check_integrity(pool)


def test_a_block_is_free_when_all_have_left_it() -> None:
    pool = BlockPool(4, SIZE)
    first, _ = write(pool, [1, 2, 3, 4])
    second, found = write(pool, [1, 2, 3, 4])
    assert second == first and found == 1 and pool.free == 3
    pool.release(first)
    assert (pool.free, pool.cached) == (3, 0)
    pool.release(second)
    assert (pool.free, pool.cached) == (4, 1)


def test_least_recently_used_blocks_go_first_and_last_ones_before_their_beginnings() -> None:
    pool = BlockPool(5, SIZE)
    for start in (0, 50):
        blocks, _ = write(pool, list(range(start, start + 8)))
        pool.release(blocks)
    blocks, found = write(pool, list(range(8)))  # used again
    assert found == 2
    pool.release(blocks)
    taken = [pool.take() for _ in range(2)]  # the empty one, and the older sequence's end
    prefix = pool.prefix("a")
    assert prefix is not None
    found_again = pool.find(prefix, list(range(50, 58)))
    assert len(found_again) == 1
    pool.release([*taken, *found_again])
    assert write(pool, list(range(8)))[1] == 2
    check_integrity(pool)


@pytest.mark.parametrize("salts", [("", "x"), ("x", "y")])
def test_neither_tenants_nor_salts_share_blocks(salts: tuple[str, str]) -> None:
    pool = BlockPool(8, SIZE)
    prefixes = [pool.prefix("a", salts[0]), pool.prefix("b", salts[0]), pool.prefix("a", salts[1])]
    for prefix in prefixes:
        assert prefix is not None
        assert pool.find(prefix, [1, 2, 3, 4]) == []
        pool.keep(prefix, [1, 2, 3, 4], 4, [pool.take()])
    assert len(pool._blocks) == 3
    # A tenant's name and a salt are told apart wherever one ends.
    assert pool.prefix("a", "b") != pool.prefix("ab")


def test_nothing_is_found_after_forgetting_nor_left_by_who_began_before_it() -> None:
    pool = BlockPool(8, SIZE)
    prefix = pool.prefix("a")
    assert prefix is not None
    running = [pool.take(), pool.take()]
    pool.keep(prefix, [1, 2, 3, 4, 5], 5, running)
    idle, _ = write(pool, [7, 7, 7, 7])
    pool.release(idle)
    pool.forget()
    assert (pool.free, pool.cached) == (6, 0)
    pool.keep(prefix, [1, 2, 3, 4, 5, 6, 7, 8], 8, running)
    pool.release(running)
    assert (pool.free, pool.cached) == (8, 0)
    assert write(pool, [1, 2, 3, 4, 5, 6, 7, 8])[1] == 0
    check_integrity(pool)


def test_switched_off_nothing_is_kept() -> None:
    pool = BlockPool(2, SIZE, enable_prefix_caching=False)
    assert pool.prefix("a") is None
    pool.release([pool.take()])
    assert (pool.free, pool.cached) == (2, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_find_what_was_written_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12, SIZE)
    written: dict[int, tuple[str, tuple[int, ...]]] = {}
    going: list[list[int]] = []
    hits = 0
    for _ in range(300):
        if going and rng.random() < 0.5:
            pool.release(going.pop(rng.randrange(len(going))))
        else:
            tenant = rng.choice("ab")
            tokens = [int(rng.random() < 0.1) for _ in range(rng.randrange(1, 14))]
            prefix = pool.prefix(tenant)
            assert prefix is not None
            blocks = pool.find(prefix, tokens)
            hits += len(blocks)
            for i, block in enumerate(blocks):
                assert written[block] == (tenant, tuple(tokens[: (i + 1) * SIZE]))
            need = -(-len(tokens) // SIZE) - len(blocks)
            if need > pool.free:
                pool.release(blocks)
                continue
            for i in range(len(blocks), len(blocks) + need):
                blocks.append(pool.take())
                written[blocks[-1]] = tenant, tuple(tokens[: (i + 1) * SIZE])
            pool.keep(prefix, tokens, len(tokens), blocks)
            going.append(blocks)
        if rng.random() < 0.02:
            pool.forget()
            for block in pool._empty:
                written.pop(block, None)
        check_integrity(pool)
    assert hits > 20
