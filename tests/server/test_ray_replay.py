"""Answers that begin anew: the server over an engine whose replicas are lost on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from common import load_engine
from common.errors import EngineError, MoetelError
from common.serving.engine import GREEDY
from common.serving.scheduler_options import SchedulerOptions
from common.store import Store
from tests.server.live import GOOD, Live, Loop, error, events

pytest.importorskip("ray.serve", reason="needs the extra ray")

from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError

from scripts.ray.failures import Failure
from scripts.ray.remote import RemoteEngine
from scripts.ray.replica import EngineReplica
from scripts.ray.settings import RaySettings


class Replicas:
    """A handle as Ray Serve's, whose replicas are one engine. `ends` has how the next tries end:
    after how many tokens, and with what. Then tries go well, with `change`d prompts."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.ends: list[tuple[int, BaseException | None]] = []
        self.change = 0
        self.tries = 0
        self.refusal: Exception | None = None

    def options(self, **_: Any) -> Any:
        return self

    def remote(self, tenant: str, prompt: list[int], params: Any, options: Any) -> Stream:
        self.tries += 1
        end = self.ends.pop(0) if self.ends else None
        if end is None:
            prompt = [prompt[0] + self.change, *prompt[1:]]
        return Stream(self._answer(tenant, prompt, params, options, end), self.refusal)

    async def _answer(self, *args: Any) -> AsyncIterator[Any]:
        *asked, options, end = args
        if self.refusal is not None:
            raise self.refusal
        number = 0
        try:
            async for output in self._engine.generate(*asked, **options):
                if end is not None and number == end[0]:
                    if end[1] is None:
                        return
                    raise end[1]
                number += 1
                yield output
        except MoetelError as found:
            yield Failure.of(found)


class Stream:
    """As `DeploymentResponseGenerator`."""

    def __init__(self, outputs: AsyncIterator[Any], refusal: Exception | None):
        self._outputs, self._refusal = outputs, refusal

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._outputs

    def cancel(self) -> None:
        if self._refusal is not None:
            raise self._refusal


@pytest.fixture(scope="module")
def shared(store_path: Path) -> Iterator[Loop]:
    loop = Loop(load_engine(store_path, device="cpu"))
    yield loop
    loop.close()


@pytest.fixture
def replicas(shared: Loop) -> Replicas:
    return Replicas(shared.engine)


@pytest.fixture
def live(shared: Loop, store_path: Path, replicas: Replicas) -> Iterator[Live]:
    remote: Any = RemoteEngine(Store.open(store_path), SchedulerOptions(), replicas)
    remote.engine.load_texts()
    with shared.serve() as found:
        found.app.state.service.engine = remote
        yield found


BODY = GOOD | {"max_tokens": 8, "ignore_eos": True}
SAMPLED = BODY | {"temperature": 0.9}
DIED = ActorDiedError()
LOSSES = {
    "died": DIED,
    "node": NodeDiedError("gone"),
    "cancelled": asyncio.CancelledError(),
    "Ray's cancelled": TaskCancelledError(),
    "ended early": None,
}


def said(live: Live, body: dict[str, Any]) -> str:
    if not body.get("stream"):
        return str(live.post("/v1/completions", body).json()["choices"][0]["text"])
    reply = live.post("/v1/completions", body)
    *pieces, last = events(reply.text)
    assert last == "[DONE]"
    return "".join(json.loads(p)["choices"][0]["text"] for p in pieces)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_loss_is_not_seen(
    live: Live, replicas: Replicas, after: int, loss: str, stream: bool
) -> None:
    expected = said(live, BODY)
    replicas.ends, replicas.tries = [(after, LOSSES[loss]), (2, DIED)], 0
    assert said(live, BODY | {"stream": stream}) == expected
    assert replicas.tries == 3


def test_samples_without_a_seed_go_on_as_they_began(live: Live, replicas: Replicas) -> None:
    replicas.ends = [(7, DIED)]
    assert len(said(live, SAMPLED | {"stream": True, "logprobs": 1})) > 0
    assert replicas.tries == 2


def test_an_answer_that_comes_otherwise_ends_a_stream_with_an_error(
    live: Live, replicas: Replicas
) -> None:
    replicas.ends, replicas.change = [(5, DIED)], 1
    reply = live.post("/v1/completions", BODY | {"stream": True, "prompt": [3, 4, 5]})
    assert reply.status_code == 200
    *pieces, failure, last = events(reply.text)
    assert len(pieces) == 5 and last == "[DONE]"
    assert "another one answers otherwise" in json.loads(failure)["error"]["message"]


def test_an_answer_that_nobody_has_seen_may_come_otherwise(live: Live, replicas: Replicas) -> None:
    replicas.change = 1
    expected = said(live, BODY | {"prompt": [3, 4, 5]})
    replicas.ends = [(5, DIED)]
    assert said(live, BODY | {"prompt": [3, 4, 5]}) == expected


def test_losses_end_after_some_tries(
    live: Live, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.ray.remote.MAX_PAUSE_S", 0.01)
    replicas.ends = [(1, DIED)] * 8
    found = error(live.post("/v1/completions", BODY), 500)
    assert "8 replicas were lost one after another" in found["message"]


def test_a_failure_of_a_replicas_code_is_not_tried_elsewhere(
    live: Live, replicas: Replicas
) -> None:
    replicas.ends = [(1, RayTaskError("generate", "it is broken", ValueError()))]
    assert "broken" in error(live.post("/v1/completions", BODY), 500)["message"]
    assert replicas.tries == 1


def test_a_full_router_is_answered_with_429(live: Live, replicas: Replicas) -> None:
    replicas.refusal = BackPressureError(3, 3)
    reply = live.post("/v1/completions", BODY | {"stream": True})
    assert error(reply, 429)["code"] == "overloaded" and int(reply.headers["retry-after"]) >= 1


def test_a_deadline_goes_on_over_a_loss(live: Live, replicas: Replicas) -> None:
    replicas.ends = [(1, DIED)] * 8
    found = error(live.post("/v1/completions", BODY | {"deadline_ms": 900}), 408)
    assert found["code"] == "deadline_exceeded"
    assert replicas.tries < 8


def test_a_replica_whose_engine_has_stopped_says_that_it_is_lost(store_path: Path) -> None:
    async def ask() -> tuple[Any, dict[str, Any]]:
        replica = EngineReplica(RaySettings(store=str(store_path), device="cpu", watch=False))
        try:

            def fail() -> None:
                raise RuntimeError("a step that cannot be computed")

            replica._engine.engine.step = fail  # type: ignore[method-assign]
            asked = "ana", [3, 4], GREEDY, {}
            found = [item async for item in replica.generate(*asked)]
            with pytest.raises(RuntimeError, match="engine has stopped"):
                await replica.check_health()
            return found[-1], await replica.record_routing_stats()
        finally:
            replica.__del__()

    failure, stats = asyncio.run(ask())
    assert isinstance(failure, Failure) and failure.is_lost
    assert isinstance(failure.error(), EngineError)
    assert stats["is_lost"]
