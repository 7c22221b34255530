"""Made-up steps before the first request, for backends that compile when they meet a shape."""

from __future__ import annotations

from common.serving.backend import Backend, Part, Row


def warm_up(
    backend: Backend, tenants: tuple[str, ...], most: int, prompt_tokens: int, new_tokens: int
) -> None:
    """See `Engine.warm_up`.

    Args:
        most: sequences that a step may hold.
    """
    names = tenants[:2]
    longest = min(map(backend.max_length, names))
    prompt = (1,) * max(1, min(prompt_tokens, longest - new_tokens))
    first, *others = (Row(name, prompt, new_tokens, cache_prefix=False) for name in names)
    _run(backend, [[first]], first, most)
    if others and min(most, backend.max_ready_tenants) > 1:
        _run(backend, [[*others, first]], first, most)


def _run(backend: Backend, arrivals: list[list[Row]], more: Row, most: int) -> None:
    """Steps in which some rows read while all before them answer, the last without any to read.

    Stops where memory ends.
    """
    there = len(arrivals[0])
    while there < most:
        arrivals = [*arrivals, [more] * min(there, most - there)]
        there += len(arrivals[-1])
    begun: list[int] = []
    try:
        for rows in [*arrivals, []]:
            new = [backend.begin(row) for row in rows]
            parts = [Part(s, token_id=1) for s in begun]
            parts += [Part(s, read=row.unread) for s, row in zip(new, rows, strict=True)]
            begun += new
            if not backend.fits(parts):
                return
            backend.step(parts)
    finally:
        backend.end(begun)
