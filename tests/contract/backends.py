"""Tiny stores for each backend, how they are loaded, and who says what they answer."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import extend_store
from common.checkpoints.safetensors_file import TensorRef
from common.serving.backend import Backend
from common.serving.fake import EXPERTS, FakeBackend, FakeStore, answer
from common.serving.loading import load_engine
from common.store import Store
from tests import helpers
from tests.helpers import build_round_robin

TENANTS = ("base", "ana", "bob")
NEWCOMER = "cy"
SLOTS = 6


class Made(ABC):
    """Three tenants whose plan leaves misses, and stores that a running backend is to go on with.

    more: the same store with another tenant beside. refused: stores that no running backend takes.
    """

    framework: str | None = None
    more: Any
    refused: list[Any]

    @abstractmethod
    def __init__(self, root: Path): ...

    @abstractmethod
    def load(
        self,
        small: bool = False,
        ready: int | None = None,
        slots: int | None = SLOTS,
        **options: Any,
    ) -> Backend:
        """small: with caches that a few sequences fill. ready: tenants in use at once.
        slots: copies in the plan; None: one for each position. options: the backend's own."""

    @abstractmethod
    def answer(self, tenant: str, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy, and not from the backend."""

    @abstractmethod
    def without_reading(self, slots: int | None) -> AbstractContextManager[Any]:
        """The store, opened again, while no weight of it can be read."""


class FakeMade(Made):
    def __init__(self, root: Path):
        self.more = FakeStore((*TENANTS, NEWCOMER))
        self.refused = [FakeStore(TENANTS, experts=replace(EXPERTS, num_experts=2))]

    def load(
        self,
        small: bool = False,
        ready: int | None = None,
        slots: int | None = SLOTS,
        **options: Any,
    ) -> Backend:
        return FakeBackend(TENANTS, room=32 if small else 10**6, ready=ready, **options)

    def answer(self, tenant: str, prompt: Sequence[int], count: int) -> list[int]:
        return answer(tenant, prompt, count, ignore_eos=True)

    @contextmanager
    def without_reading(self, slots: int | None) -> Iterator[Any]:
        yield FakeStore(TENANTS)


class StoredMade(Made):
    """Of a store on disk, and models of `transformers`."""

    kv_cache_bytes: int
    """Of small caches."""

    def _save(self, root: Path, models: Sequence[Any], newcomer: Any, other: Any) -> None:
        """other: a model whose experts have another shape."""
        paths = {
            n: helpers.save(m, root / "models" / n) for n, m in zip(TENANTS, models, strict=True)
        }
        self.models = models
        self.stores = {
            slots: build_round_robin(root / f"store-{slots}", paths, slots=slots)
            for slots in (SLOTS, None)
        }
        store = self.stores[SLOTS]
        self.plan = store.plan
        shutil.copytree(store.path, root / "more")
        joins = helpers.save(newcomer, root / "models" / NEWCOMER)
        self.more = extend_store(root / "more", NEWCOMER, joins)
        shutil.copytree(self.more.path, root / "damaged")
        damaged = Store.open(root / "damaged")
        for only in set(damaged.manifest.objects) - set(store.manifest.objects):
            damaged.objects.path(only).unlink(missing_ok=True)
        shapes = {"x": helpers.save(other, root / "models" / "x")}
        self.refused = [damaged, build_round_robin(root / "shapes", shapes)]

    def load(
        self,
        small: bool = False,
        ready: int | None = None,
        slots: int | None = SLOTS,
        **options: Any,
    ) -> Backend:
        options["ready_tenants"] = ready
        if small:
            options["kv_cache_bytes"] = self.kv_cache_bytes
        return load_engine(self.stores[slots], device="cpu", **options)._require_backend()

    @contextmanager
    def without_reading(self, slots: int | None) -> Iterator[Any]:
        def refuse(ref: TensorRef) -> Any:
            raise AssertionError(f"{ref.path} is read")

        with pytest.MonkeyPatch.context() as patch:
            for way in ("read", "map"):
                patch.setattr(TensorRef, way, refuse)
            with pytest.raises(AssertionError, match="is read"):
                self.load(slots=slots)
            yield Store.open(self.stores[slots].path)


class TorchMade(StoredMade):
    framework = "torch"
    kv_cache_bytes = 4 * 4096  # 4 blocks of 16 tokens

    def __init__(self, root: Path):
        base = helpers.random_mixtral(0)
        models = [base, helpers.tuned(base, 1), helpers.tuned(base, 2)]
        other = helpers.random_mixtral(0, num_local_experts=2)
        self._save(root, models, helpers.tuned(base, 3), other)

    def answer(self, tenant: str, prompt: Sequence[int], count: int) -> list[int]:
        model = helpers.oracle(self.models, TENANTS.index(tenant), self.plan)
        return helpers.hf_greedy(model, prompt, count)


class JaxMade(StoredMade):
    framework = "jax"
    # Two rows of 32 tokens and prompts up to 16, or one row of a longer prompt.
    kv_cache_bytes = 512 * 2 * (32 + 16)

    def __init__(self, root: Path):
        from tests import switch_models

        base = switch_models.random_switch(0)
        models = [base, switch_models.tuned(base, 1), switch_models.tuned(base, 2)]
        other = switch_models.random_switch(0, num_experts=2)
        self._save(root, models, switch_models.tuned(base, 3), other)

    def answer(self, tenant: str, prompt: Sequence[int], count: int) -> list[int]:
        from tests import switch_models

        model = switch_models.oracle(self.models, TENANTS.index(tenant), self.plan)
        return switch_models.hf_greedy(model, prompt, count)
