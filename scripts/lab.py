"""The way from commands to `benchmarks/`, which a clone of the repository has and the package has
not."""

from __future__ import annotations

import importlib
from types import ModuleType

from common import EngineError


def load(module: str, what: str) -> ModuleType:
    """A module of `benchmarks`.

    Args:
        module: its name below `benchmarks`.
        what: for the error: what was asked for that needs it.

    Raises:
        EngineError: `benchmarks` is not there.
    """
    try:
        return importlib.import_module(f"benchmarks.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("benchmarks"):
            raise
        raise EngineError(
            f"{what} needs the folder benchmarks/, which is not in the installed package; in a "
            "clone of the repository run: python -m scripts.cli"
        ) from error
