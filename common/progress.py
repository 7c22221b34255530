"""Progress of long steps. Libraries take a `Progress`; scripts pass one that draws bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    def __call__(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A context manager around one long step of `total` parts; its value is called after each
        part."""
        ...


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress that shows nothing."""
    yield lambda: None


@contextmanager
def bars(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error with the time elapsed and left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
