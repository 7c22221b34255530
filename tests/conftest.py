"""Fixtures that many tests share: a family of three tenants, and a text tenant with a tokenizer."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from tests import helpers

# Before anything imports jax: virtual devices for the tests of meshes. Others use the first one.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Many tests compile the same small steps.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"moetel-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@dataclass(frozen=True)
class Family:
    """Tenants of one base, on disk and as Hugging Face models."""

    paths: dict[str, Path]
    models: list[MixtralForCausalLM]

    @property
    def names(self) -> list[str]:
        return list(self.paths)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """One thread: tiny products gain nothing from more, and lose much where the cores are busy with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """A command that ran in this process sent logs to the stderr that pytest gave that test and then closed."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler and h not in before]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """base, ana and bob: 2 layers of 4 experts, top-2, vocabulary 96, float32."""
    root = tmp_path_factory.mktemp("family")
    base = helpers.random_mixtral(0)
    models = [base, helpers.tuned(base, 1), helpers.tuned(base, 2)]
    paths = {n: helpers.save(m, root / n) for n, m in zip(("base", "ana", "bob"), models, strict=True)}
    return Family(paths, models)
