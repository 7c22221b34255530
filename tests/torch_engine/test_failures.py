"""What fails on a device leaves an engine as it was."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import EngineError, load_engine
from tests import helpers
from tests.conftest import Family
from torch_engine.experts.grouped_pool import GroupedPool
from torch_engine.tenants.by_copy import TenantsByCopy

GROUPED: dict[str, Any] = {"device": "cpu", "experts": "grouped", "products": "plain"}


def test_an_update_without_room_changes_nothing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = helpers.build_round_robin(tmp_path / "few", family.paths)
    many = helpers.build_round_robin(tmp_path / "many", family.paths, slots="all")
    rows = helpers.prompts(0, [9])
    with load_engine(few, **GROUPED) as engine:
        pool = engine._require_backend().pool  # type: ignore[attr-defined]
        before = {name: engine.logits(name, rows) for name in few.tenants}
        made, real = [], pool._empty

        def empty(slots: int) -> Any:
            made.append(slots)
            if len(made) == 2:
                raise torch.OutOfMemoryError("no room")
            return real(slots)

        monkeypatch.setattr(pool, "_empty", empty)
        with pytest.raises(EngineError, match="no room for the changed store"):
            engine.update(many)
        assert len(made) == 2
        for name in few.tenants:
            assert np.array_equal(engine.logits(name, rows), before[name])
        monkeypatch.setattr(pool, "_empty", real)
        engine.update(many)
        exact = helpers.hf_logits(family.models[0], rows)
        helpers.assert_close(engine.logits(family.names[0], rows), exact)


def test_tenants_stay_ready_when_there_is_no_room_for_more(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    ready = TenantsByCopy(store, torch.float32, torch.device("cpu"), 1)
    first, second = store.tenants[:2]
    kept = ready.acquire([first])[first].embed.clone()

    def none(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", none)
        with pytest.raises(torch.OutOfMemoryError):
            ready.update(store, 2)
    assert ready.ready == [first]
    assert torch.equal(ready.acquire([first])[first].embed, kept)
    assert second in ready.acquire([second])


def test_times_of_copies_are_told_once_they_are_known(family: Family, tmp_path: Path) -> None:
    class Event:
        """Of a copy that arrives when it is told to."""

        arrived = False

        def query(self) -> bool:
            return self.arrived

        def elapsed_time(self, end: Event) -> float:
            assert end.arrived, "torch raises here"
            return 250.0

    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    ready = TenantsByCopy(store, torch.float32, torch.device("cpu"), 1)
    name = store.tenants[0]
    ready.acquire([name])
    end = Event()
    ready._timers[name] = (Event(), end)  # type: ignore[assignment]
    assert ready.seconds() == {}
    end.arrived = True
    ready.acquire([name])
    assert ready.seconds() == {name: 0.25}
    assert ready.seconds() == {}


def test_an_expected_expert_that_did_not_arrive_is_fetched(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=3)
    rows = helpers.prompts(0, [9])
    with load_engine(store, spare_slots=4, **GROUPED) as engine:
        pool = engine._require_backend().pool  # type: ignore[attr-defined]
        assert isinstance(pool, GroupedPool)
        name = store.tenants[1]
        expected = engine.logits(name, rows)
        assert pool.counts.misses
        assert pool._spare is not None
        for slot in pool._spare.filled.values():
            failed: Future[Any] = Future()
            failed.set_exception(OSError("the file cannot be read"))
            pool._spare._coming[slot] = failed
        for matrices in (pool._spare.gate_up, pool._spare.down):
            matrices.fill_(torch.nan)
        assert np.array_equal(engine.logits(name, rows), expected)
