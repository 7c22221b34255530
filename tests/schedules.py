"""Random schedules of sequences through a backend: they join, wait, are read in pieces,
preempted and begun again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.serving.backend import Backend, Part, Row
from tests.helpers import assert_close

CLOSE = 1e-4


@dataclass
class Asked:
    """A request: its answer so far, and the logits before each token of it.

    found: tokens that were in the cache whenever it began.
    """

    tenant: str
    prompt: list[int]
    count: int
    answer: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    number: int | None = None
    unread: int = 0
    found: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.answer) == self.count

    def row(self) -> Row:
        return Row(self.tenant, tuple(self.prompt), self.count, tuple(self.answer))

    def begin(self, backend: Backend) -> None:
        self.number = backend.begin(self.row())
        found = backend.cached(self.number)
        self.unread = self.row().unread - found
        self.found += found

    def part(self, read: int) -> Part:
        assert self.number is not None
        return Part(self.number, read, -1 if read else self.answer[-1], want_logits=True)


def advance(backend: Backend, chosen: Sequence[tuple[Asked, int]]) -> dict[str, float]:
    """One step: (request, tokens to read, 0: answer)."""
    step = backend.step([asked.part(read) for asked, read in chosen])
    for i, (asked, read) in enumerate(chosen):
        asked.unread -= read
        asked.hits += int(step.hits[i])
        asked.misses += int(step.misses[i])
        if asked.unread:
            assert step.token_ids[i] == -1 and step.logits[i] is None
            continue
        values = step.logits[i]
        assert (
            values is not None
            and values.dtype == np.float32
            and int(values.argmax()) == step.token_ids[i]
        )
        asked.answer.append(int(step.token_ids[i]))
        asked.logits.append(values)
    return step.reconfiguration_s


def begun(backend: Backend, tenant: str, prompt: list[int], count: int) -> Asked:
    """A sequence that has read its prompt."""
    asked = Asked(tenant, prompt, count)
    asked.begin(backend)
    advance(backend, [(asked, asked.unread)])
    return asked


def finish(backend: Backend, asked: Asked) -> list[int]:
    """The answer, all that is left of it read and taken; the sequence ends."""
    while not asked.is_done:
        advance(backend, [(asked, asked.unread)])
    backend.end([asked.number or 0])
    return asked.answer


def alone(backend: Backend, requests: Sequence[Asked]) -> list[Asked]:
    """The same requests, one after the other, each read at once."""
    found = [Asked(r.tenant, r.prompt, r.count) for r in requests]
    for asked in found:
        asked.begin(backend)
        advance(backend, [(asked, asked.unread)])
        while not asked.is_done:
            advance(backend, [(asked, 0)])
        assert asked.number is not None
        backend.end([asked.number])
    return found


def run(
    backend: Backend, requests: Sequence[Asked], seed: int, most_tenants: int | None = None
) -> int:
    """Answer requests in a random order. Returns how many were preempted and begun again."""
    rng = random.Random(seed)
    preempted = 0
    while going := [r for r in requests if not r.is_done]:
        chosen: list[tuple[Asked, int]] = []
        for asked in rng.sample(going, rng.randint(1, len(going))):
            names = {a.tenant for a, _ in chosen} | {asked.tenant}
            if most_tenants is not None and len(names) > most_tenants:
                continue
            if asked.number is not None and rng.random() < 0.07:
                backend.end([asked.number])
                asked.number, preempted = None, preempted + 1
            if asked.number is None:
                asked.begin(backend)
            read = rng.choice([asked.unread, rng.randint(1, asked.unread)]) if asked.unread else 0
            chosen.append((asked, read))
        if not chosen:
            continue
        assert backend.fits([a.part(r) for a, r in chosen])
        advance(backend, chosen)
        for asked in requests:
            if asked.is_done and asked.number is not None:
                backend.end([asked.number])
                asked.number = None
    return preempted


def requests_of(
    names: Sequence[str], seed: int, count: int, longest: int = 40, answer: int = 8
) -> list[Asked]:
    rng = np.random.default_rng(seed)

    def ids(n: int) -> Any:
        return rng.integers(3, 96, n).tolist()

    return [
        Asked(
            names[int(rng.integers(len(names)))],
            ids(int(rng.integers(1, longest))),
            int(rng.integers(1, answer)),
        )
        for _ in range(count)
    ]


def beginning_alike(names: Sequence[str], seed: int, count: int, block: int) -> list[Asked]:
    """Requests of which many begin with the same blocks, whoever's they are."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(3, 96) for _ in range(block * 2 + 3)] for _ in range(2)]
    found = []
    for _ in range(count):
        same = rng.choice(beginnings)[: rng.choice([block, block + 2, 2 * block, 2 * block + 3])]
        more = [rng.randrange(3, 96) for _ in range(rng.choice([0, 1, 5, block]))]
        found.append(Asked(rng.choice(list(names)), [*same, *more], rng.randrange(1, 9)))
    return found


def check_equal(found: Sequence[Asked], expected: Sequence[Asked]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.answer == theirs.answer
        for a, b in zip(ours.logits[-len(theirs.logits) :], theirs.logits, strict=True):
            assert_close(a, b, CLOSE)
