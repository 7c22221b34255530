"""Positions planned side by side: each in a thread of its own, with its share of BLAS's threads.

Products of one position are too small for many threads, and half of its time is none of products.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from common.families import ExpertSpec

Item = TypeVar("Item")
Result = TypeVar("Result")

# Bytes that positions which are planned at once may take.
AT_ONCE_BYTES = 4 << 30


def position_bytes(spec: ExpertSpec, tenants: int) -> int:
    """About what one position takes while it is planned: tenants' weights in float32, a copy, and
    what is made of them."""
    return 4 * spec.copy_elements * (2 * tenants + 8)


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], nbytes: int
) -> Iterator[Result]:
    """What `work` makes of each item, in their order. nbytes: that one item takes.

    As many at once as BLAS has threads and `AT_ONCE_BYTES` hold. An error of `work` is raised here,
    after the items that had begun.
    """
    np.ones((2, 2)) @ np.ones((2, 2))  # so that BLAS is there to be asked
    threads = max((one["num_threads"] for one in _blas()), default=1)
    workers = max(1, min(threads, len(items), AT_ONCE_BYTES // nbytes))
    if workers == 1:
        yield from map(work, items)
        return
    with threadpool_limits(threads // workers, user_api="blas"):
        pool = ThreadPoolExecutor(workers, thread_name_prefix="planning")
        try:
            begun: deque[Future[Result]] = deque()
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > workers:  # one waits, so that no thread does
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _blas() -> list[dict[str, int]]:
    return [one for one in threadpool_info() if one["user_api"] == "blas"]
