"""Servers follow what others make of their store, and write nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import build_store, extend_store, load_engine, remove_tenant
from common.store.manifest import FILE
from scripts.server.settings import ServerSettings
from tests import helpers
from tests.server.live import Live, Loop, events, wait_for
from tests.server.test_serve_command import serving

GOOD: dict[str, Any] = {
    "model": "ana",
    "prompt": "hello",
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def store(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "store"
    build_store(path, {n: checkpoints[n] for n in ("ana", "bob")}, policy="round_robin", slots=6)
    return path


@pytest.fixture
def followed(store: Path) -> Iterator[tuple[Live, Loop]]:
    """A server whose watch is asked to look by the tests alone."""
    loop = Loop(load_engine(store, device="cpu"))
    with loop.serve(ServerSettings()) as live:
        yield live, loop
    loop.close()


def look(live: Live, loop: Loop) -> bool:
    watch = live.app.state.service.watch
    return bool(loop.run(watch.look()))


def text_of(live: Live, tenant: str) -> str:
    reply = live.post("/v1/completions", GOOD | {"model": tenant})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_tenants_come_and_go(
    followed: tuple[Live, Loop], store: Path, checkpoints: dict[str, Path]
) -> None:
    live, loop = followed
    before = text_of(live, "ana")
    assert not look(live, loop), "nothing has changed"
    extend_store(store, "new", checkpoints["new"])
    assert live.post("/v1/completions", GOOD | {"model": "new"}).status_code == 404
    assert look(live, loop) and not look(live, loop)
    with load_engine(store, device="cpu") as engine:
        expected = engine.generate("new", "hello", engine_params())
    assert text_of(live, "new") == expected.text and text_of(live, "ana") == before
    remove_tenant(store, "new", keep_plan=True)
    assert look(live, loop)
    assert live.post("/v1/completions", GOOD | {"model": "new"}).status_code == 404
    assert 'moetel_store_changes_total{taken="true"} 2.0' in live.get("/metrics").text
    assert 'model_name="new"' not in live.get("/metrics").text


def engine_params() -> Any:
    from common import SamplingParams

    return SamplingParams(max_new_tokens=8, ignore_eos=True)


def test_a_tenant_becomes_another_model(
    followed: tuple[Live, Loop], store: Path, checkpoints: dict[str, Path]
) -> None:
    live, loop = followed
    before = text_of(live, "bob")
    other = {"ana": checkpoints["ana"], "bob": checkpoints["new"]}
    build_store(store, other, policy="round_robin", slots=6)
    assert look(live, loop)
    with load_engine(store, device="cpu") as engine:
        expected = engine.generate("bob", "hello", engine_params())
    assert text_of(live, "bob") == expected.text != before


def test_a_tenant_goes_when_its_requests_are_done(followed: tuple[Live, Loop], store: Path) -> None:
    live, loop = followed
    long = GOOD | {"model": "bob", "max_tokens": 300, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=long) as stream:
        wait_for(lambda: loop.busy() == 1)
        remove_tenant(store, "bob", keep_plan=True)
        changed: list[bool] = []
        thread = threading.Thread(target=lambda: changed.append(look(live, loop)))
        thread.start()
        assert len(events("".join(stream.iter_text()))) == 301
    thread.join(30)
    assert changed == [True]
    assert live.post("/v1/completions", GOOD | {"model": "bob"}).status_code == 404


def test_what_cannot_be_read_is_not_taken(followed: tuple[Live, Loop], store: Path) -> None:
    live, loop = followed
    before, whole = text_of(live, "ana"), (store / FILE).read_bytes()
    (store / FILE).write_bytes(whole[: len(whole) // 2])
    assert not look(live, loop)
    assert text_of(live, "ana") == before
    assert 'moetel_store_changes_total{taken="false"} 1.0' in live.get("/metrics").text
    (store / FILE).write_bytes(whole)
    assert not look(live, loop), "it is what is served"
    assert text_of(live, "ana") == before


def test_a_store_is_not_watched_if_nobody_wants_it(store: Path) -> None:
    loop = Loop(load_engine(store, device="cpu"))
    with loop.serve(ServerSettings(watch_store=False)) as live:
        assert live.app.state.service.watch is None
    loop.close()


@pytest.mark.slow
def test_two_servers_follow_one_store(store: Path, checkpoints: dict[str, Path]) -> None:
    """`moetel add` from outside is served by both within seconds, and neither writes."""
    import httpx2

    def status(url: str) -> int:
        return httpx2.post(f"{url}/v1/completions", json=GOOD | {"model": "new"}).status_code

    with serving(store) as one, serving(store) as two:
        added = [sys.executable, "-m", "scripts.cli", "add", str(store)]
        added += ["--tenant", f"new={checkpoints['new']}", "--keep-plan"]
        subprocess.run(added, check=True, cwd=helpers.REPOSITORY, capture_output=True)
        files = {p: p.stat().st_mtime_ns for p in sorted(store.rglob("*"))}
        begun = time.monotonic()
        for server in (one, two):
            wait_for(lambda url=server.url: status(url) == 200)  # type: ignore[misc]
        print("followed after", round(time.monotonic() - begun, 2), "s")  # noqa: T201
        texts = {
            httpx2.post(f"{s.url}/v1/completions", json=GOOD).json()["choices"][0]["text"]
            for s in (one, two)
        }
        assert len(texts) == 1
        assert {p: p.stat().st_mtime_ns for p in sorted(store.rglob("*"))} == files
        for server in (one, two):
            code, log = server.stop()
            assert code == 0 and "1 tenants" not in log and "new came" in log, log
