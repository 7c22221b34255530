"""KV caches: they stay as they are while a sequence waits, and what fits is counted."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common import EngineError
from common.serving.backend import Part, Row
from jax_engine.backend import load_backend
from tests.helpers import build_round_robin, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily, backend_for
from tests.schedules import Asked, advance, alone


@pytest.mark.slow
@pytest.mark.parametrize("slots", rest_slow([5, None]))
def test_a_pause_leaves_caches_as_they_are(
    small_family: SwitchFamily, tmp_path: Path, slots: Any
) -> None:
    """Bit for bit, in steps of its own tenant, in whole calls and layer by layer, and of others."""
    store = build_round_robin(tmp_path / "store", small_family.paths, slots=slots)
    backend = backend_for(store)
    waits, goes, other = (
        Asked(n, p, 40) for n, p in zip(("ana", "ana", "bob"), prompts(2, [9, 4, 12]), strict=True)
    )
    for one in (waits, goes, other):
        one.begin(backend)
    advance(backend, [(a, a.unread) for a in (waits, goes, other)])
    advance(backend, [(waits, 0), (goes, 0)])

    def held() -> list[np.ndarray]:
        held = backend.sequences.caches.caches["ana"]
        row = held.row_of(waits.number or 0)
        cache = [np.array(a[row, :, : held.lengths[row]]) for pair in held.cache for a in pair]
        return cache + [np.array(a[row, :, :9]) for pair in held.encoded for a in pair]

    before = held()
    for _ in range(3):
        advance(backend, [(goes, 0)])
        advance(backend, [(goes, 0), (other, 0)])
    assert all(np.array_equal(a, b) for a, b in zip(before, held(), strict=True))
    late = Asked("ana", prompts(3, [30])[0], 3)
    late.begin(backend)
    advance(backend, [(late, late.unread), (goes, 0)])  # the caches move to larger arrays
    assert all(np.array_equal(a, b) for a, b in zip(before, held(), strict=True))
    advance(backend, [(waits, 0)])
    assert waits.answer == alone(backend, [Asked("ana", waits.prompt, 3)])[0].answer


@pytest.mark.slow
def test_memory_is_counted_and_freed(small_family: SwitchFamily, tmp_path: Path) -> None:
    backend = backend_for(build_round_robin(tmp_path / "store", small_family.paths))
    requests = [
        Asked(n, p, 40)
        for n, p in zip(("base", "ana", "ana", "ana"), prompts(0, [5, 20, 40, 3]), strict=True)
    ]
    others = {id(a): a for a in jax.live_arrays()}  # what this process's other tests have left

    def used() -> int:
        held = backend.sequences.caches.caches.values()
        real = sum(
            a.nbytes for cache in held for pair in [*cache.cache, *cache.encoded] for a in pair
        )
        real += sum(s.x.nbytes for s in backend.sequences._sequences.values() if s.x is not None)
        assert backend.stats()["kv_cache_used_bytes"] == real
        return real

    for asked in requests:
        asked.begin(backend)
    assert used() == 0
    advance(backend, [(a, a.unread - 1) for a in requests])
    assert 0 < used() == sum(n * 32 * 4 for n in (16, 32, 48, 16))
    advance(backend, [(a, a.unread) for a in requests])
    # Two decoder layers, keys and values, 4 heads of 8, float32: 512 bytes a token.
    assert used() == 512 * (1 * (32 + 16) + 4 * (32 + 48))
    backend.end([requests[0].number or 0])
    assert used() == 512 * 4 * (32 + 48)
    backend.end([requests[i].number or 0 for i in (2, 3)])
    for _ in range(30):
        advance(backend, [(requests[1], 0)])
    assert used() == 512 * (32 + 32)  # after a while it moves to smaller arrays
    advance(backend, [(requests[1], 0)])
    advance(backend, [(requests[1], 0)])
    assert used() == 512 * (64 + 32)
    assert requests[1].answer == alone(backend, [Asked("ana", requests[1].prompt, 33)])[0].answer
    backend.end([requests[1].number or 0, 999])
    assert used() == 0
    gc.collect()
    assert not [a for a in jax.live_arrays() if a.ndim == 4 and id(a) not in others]


@pytest.mark.slow
def test_what_fits_and_what_does_not(small_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    # Memory for two rows, 32 tokens and prompts up to 16, or for one row of a longer one.
    backend = backend_for(store, kv_cache_bytes=512 * 2 * (32 + 16))
    assert backend.stats()["kv_cache_bytes"] == 512 * 96
    assert backend.max_length("ana") == 32  # 512 * (32 + 32) + the encoder's states
    first, second, third, long = (Asked("ana", p, 100) for p in prompts(0, [5, 9, 7, 17]))
    for asked in (first, second, third, long):
        asked.begin(backend)

    def parts(*some: tuple[Asked, int]) -> list[Part]:
        return [a.part(read) for a, read in some]

    assert backend.fits(parts((first, 5), (second, 9)))
    assert not backend.fits(parts((first, 5), (second, 9), (third, 7)))
    assert backend.fits(parts((long, 17))) and not backend.fits(parts((long, 17), (first, 5)))
    assert backend.fits(parts((long, 17)), ahead=31)
    assert not backend.fits(parts((first, 5)), ahead=64)
    assert backend.fits(parts((first, 5)), ahead=31) and backend.fits(parts((first, 5)), ahead=32)
    advance(backend, [(first, 5), (second, 9)])
    assert not backend.fits(parts((third, 7)))  # the others keep theirs
    assert not backend.fits(parts((third, 1)))  # nor do the encoder's states fit
    assert backend.fits(parts((first, 0)), ahead=30) and not backend.fits(
        parts((first, 0)), ahead=31
    )
    while len(first.answer) < 32:
        advance(backend, [(first, 0), (second, 0)])
    assert not backend.fits(parts((first, 0)))
    backend.end([second.number or 0])
    assert backend.fits(parts((first, 0)))
    advance(backend, [(first, 0)])  # memory is short, so the cache shrinks at once
    assert (
        backend.stats()["kv_cache_used_bytes"]
        == 512 * (64 + 16)
        <= backend.stats()["kv_cache_bytes"]
    )
    assert first.answer == alone(backend_for(store), [Asked("ana", first.prompt, 33)])[0].answer


def test_the_longest_answer_counts(small_family: SwitchFamily, tmp_path: Path) -> None:
    """ahead looks no farther than max_new_tokens."""
    store = build_round_robin(tmp_path / "store", small_family.paths)
    backend = backend_for(store, kv_cache_bytes=512 * (32 + 16) + 4 * 32 * 16)
    short, long = (backend.begin(Row("ana", (5, 6), n)) for n in (32, 33))
    assert backend.fits([Part(short, 2)], ahead=1000) and not backend.fits(
        [Part(long, 2)], ahead=1000
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4GiB"])
def test_bad_sizes_are_refused(small_family: SwitchFamily, tmp_path: Path, value: Any) -> None:
    store = build_round_robin(tmp_path / "store", small_family.paths)
    with pytest.raises(EngineError, match=r"kv_cache_bytes is .*; give a whole number from 1"):
        load_backend(store, kv_cache_bytes=value)
    with pytest.raises(
        EngineError, match="kv_cache_bytes is 100; one short sequence of tenant 'base' takes 26624"
    ):
        load_backend(store, kv_cache_bytes=100)


def test_cache_size_by_default(small_family: SwitchFamily, tmp_path: Path) -> None:
    backend = backend_for(build_round_robin(tmp_path / "store", small_family.paths))
    assert 0 < backend.stats()["kv_cache_bytes"] <= 4 << 30
    assert backend.max_length("ana") == backend.loaded.shape("ana").max_positions
