"""Fixtures of the JAX engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax

from common import Store
from jax_engine.backend import JaxBackend, load_backend
from tests import helpers, switch_models


@dataclass(frozen=True)
class SwitchFamily:
    """Tenants of one base, on disk and as Hugging Face models."""

    paths: dict[str, Path]
    models: list[switch_models.Model]


def save_family(root: Path, models: list[switch_models.Model]) -> SwitchFamily:
    names = ("base", "ana", "bob")[: len(models)]
    return SwitchFamily(
        {n: helpers.save(m, root / n) for n, m in zip(names, models, strict=True)}, models
    )


@pytest.fixture(scope="session")
def switch_family(tmp_path_factory: pytest.TempPathFactory) -> SwitchFamily:
    """base, ana and bob: 4 layers a side, every second sparse with 4 experts, vocabulary 96,
    float32."""
    sizes = {
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
    }
    base = switch_models.random_switch(0, **sizes)
    models = [base, switch_models.tuned(base, 1), switch_models.tuned(base, 2)]
    return save_family(tmp_path_factory.mktemp("switch"), models)


@pytest.fixture(scope="session")
def small_family(tmp_path_factory: pytest.TempPathFactory) -> SwitchFamily:
    """base, ana and bob: three encoder layers, one of them sparse, and two decoder layers; 4
    experts, float32."""
    base = switch_models.random_switch(0, num_layers=3, num_sparse_encoder_layers=1)
    return save_family(
        tmp_path_factory.mktemp("small"),
        [base, switch_models.tuned(base, 1), switch_models.tuned(base, 2)],
    )


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> SwitchFamily:
    """base, ana and bob: one sparse layer a side with 4 experts, vocabulary 96, float32."""
    base = switch_models.random_switch(0)
    return save_family(
        tmp_path_factory.mktemp("tiny"),
        [base, switch_models.tuned(base, 1), switch_models.tuned(base, 2)],
    )


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def backend_for(store: Store, **options: Any) -> JaxBackend:
    """A backend, or a skip where our own kernels cannot be had."""
    if options.get("products") == "native":
        from jax_engine import native

        if native.load() is None:
            pytest.skip("no kernels of our own here: see native.load for what they need")
    backend = load_backend(store, **options)
    assert isinstance(backend, JaxBackend)
    return backend
