"""Tests of `common` run without any framework: here each import of one fails, wherever it
stands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import checkpoints

ABSENT = ("torch", "transformers", "jax", "flax", "torch_engine", "jax_engine")


@pytest.fixture(scope="package", autouse=True)
def no_frameworks() -> Iterator[None]:
    """Also where tests of another folder have imported them before, in the same process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ABSENT:
            patch.setitem(sys.modules, name, None)  # so that `import name` fails
        yield


@dataclass(frozen=True)
class Family:
    """Tenants of one base, on disk and in memory."""

    paths: dict[str, Path]
    models: list[checkpoints.Model]

    @property
    def names(self) -> list[str]:
        return list(self.paths)


@pytest.fixture(scope="package")
def family(no_frameworks: None, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """base, ana and bob: 2 layers of 4 experts, top-2, vocabulary 96, float32."""
    root = tmp_path_factory.mktemp("family")
    base = checkpoints.random_mixtral(0)
    models = {"base": base, "ana": checkpoints.tuned(base, 1), "bob": checkpoints.tuned(base, 2)}
    return Family(
        {n: checkpoints.save(m, root / n) for n, m in models.items()}, list(models.values())
    )
