"""Fixtures that many tests share. Nothing here imports a framework before a test asks for it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# One thread, before numpy or torch is imported: tiny products gain nothing from more, and threads
# that wait for each other take processor time from the other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import helpers

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM

# Before anything imports jax: virtual devices for the tests of meshes. Others use the first one.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Many tests compile the same small steps.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"moetel-tests-{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Each step is compiled for a few calls: XLA's passes would take longer than they save. CI runs the
# engines' tests with them as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Triton reads it once, when it is imported, which torch does in some tests. Without a card its
# kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class Family:
    """Tenants of one base, on disk and as Hugging Face models."""

    paths: dict[str, Path]
    models: list[MixtralForCausalLM]

    @property
    def names(self) -> list[str]:
        return list(self.paths)


VARIATIONS = 2
"""How many parameters of a test run by default."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most variations of tests that have many to CI: what is left is spread over their
    parameters."""
    if os.environ.get("CI"):
        return
    functions: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if "[" in item.name and item.get_closest_marker("slow") is None:
            functions.setdefault(
                (item.parent.nodeid if item.parent else "", item.name.split("[")[0]), []
            ).append(item)
    for variations in functions.values():
        kept = {i * len(variations) // VARIATIONS for i in range(VARIATIONS)}
        for i, item in enumerate(variations):
            if len(variations) > VARIATIONS and i not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Tests write thousands of small files; none has to survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """A command that ran in this process sent logs to the stderr that pytest gave that test and
    then closed."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [
        h for h in root.handlers if type(h) is logging.StreamHandler and h not in before
    ]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """base, ana and bob: 2 layers of 4 experts, top-2, vocabulary 96, float32."""
    root = tmp_path_factory.mktemp("family")
    base = helpers.random_mixtral(0)
    models = [base, helpers.tuned(base, 1), helpers.tuned(base, 2)]
    paths = {
        n: helpers.save(m, root / n) for n, m in zip(("base", "ana", "bob"), models, strict=True)
    }
    return Family(paths, models)
