"""Weighted max-min fairness: who gets how many of a step's places."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping

from common.serving.request import Request


def first_of(requests: Iterable[Request], places: int) -> list[Request]:
    """The requests of one tenant that take its places, first ones first."""
    return heapq.nsmallest(places, requests, key=lambda r: r.order)


def max_min(
    wanted: Mapping[str, int],
    places: int,
    weight: Callable[[str], float],
    served: Callable[[str], float],
) -> dict[str, int]:
    """Weighted max-min fair numbers of places for tenants.

    What one does not need goes to the others; what is left over, to those served least.
    """
    given, left = dict.fromkeys(wanted, 0), places
    while left:
        wanting = [name for name in wanted if given[name] < wanted[name]]
        if not wanting:
            break
        total = sum(map(weight, wanting))
        share = {name: int(left * weight(name) / total) for name in wanting}
        if not any(share.values()):
            for name in sorted(wanting, key=served)[:left]:
                given[name] += 1
            break
        for name in wanting:
            more = min(share[name], wanted[name] - given[name])
            given[name] += more
            left -= more
    return given
