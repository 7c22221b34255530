"""A tenant whose files were damaged after the build: the others are served, and it says what is
wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import Store, build_store, load_engine
from common.checkpoints.generation_config import GenerationConfig
from common.store.manifest import Manifest
from scripts.server.keys import KeyRing, _key, new_key
from scripts.server.settings import ServerSettings
from tests import helpers
from tests.server.live import GOOD, Live, Loop, error
from tests.server.test_serve_command import serving
from tests.server.test_serve_operations import scrape


def _truncate(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])


def _no_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")


def _other_kind(folder: Path) -> None:
    path = folder / "tokenizer.json"
    made = json.loads(path.read_text())
    made["model"]["type"] = "SuperBPE"
    path.write_text(json.dumps(made))


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "config": _no_json,
    "kind": _other_kind,
}


def _generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')


@pytest.fixture
def damaged(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A store whose tenant `bob` will be damaged."""
    path = tmp_path / "store"
    build_store(path, {n: checkpoints[n] for n in ("ana", "bob")})
    return path


def _assets(store: Path, tenant: str) -> Path:
    """The tenant's own copy of its small files."""
    folder = Store.open(store).assets_dir(tenant)
    assert folder != Store.open(store).assets_dir("ana")
    return folder


@pytest.fixture
def served(damaged: Path) -> Iterator[Callable[..., Live]]:
    """(settings) -> a server of the store, as it is then."""
    loops: list[Any] = []

    def serve(settings: ServerSettings | None = None) -> Live:
        loop = Loop(load_engine(damaged, device="cpu"))
        loop.engine.engine.load_texts()  # as `moetel serve` does
        context = loop.serve(settings)
        loops.append((loop, context))
        return context.__enter__()

    yield serve
    for loop, context in loops:
        context.__exit__(None, None, None)
        loop.close()


def unavailable(reply: Any) -> str:
    found = error(reply, 503)
    assert found["code"] == "tenant_unavailable" and found["param"] == "model"
    assert reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers
    assert "build again" in found["message"]
    return str(found["message"])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_damaged_tokenizer(damaged: Path, served: Callable[..., Live], kind: str) -> None:
    TOKENIZERS[kind](_assets(damaged, "bob"))
    live = served()
    for body in (
        {"prompt": "text"},
        {"prompt": ["a", "b"]},
        {"prompt": "text", "stream": True},
        {"prompt": [5], "stop": "x"},
        {"prompt": [5], "echo": True},
    ):
        assert "tokenizer" in unavailable(
            live.post("/v1/completions", GOOD | {"model": "bob"} | body)
        )
    messages = [{"role": "user", "content": "x"}]
    unavailable(live.post("/v1/chat/completions", {"model": "bob", "messages": messages}))
    unavailable(live.post("/tokenize", {"model": "bob", "prompt": "x"}))
    unavailable(live.post("/tokenize", {"model": "bob", "messages": messages}))
    unavailable(live.post("/detokenize", {"model": "bob", "tokens": [5]}))
    # Token ids need none of it.
    reply = live.post("/v1/completions", GOOD | {"model": "bob", "prompt": [70, 71], "logprobs": 1})
    (choice,) = reply.json()["choices"]
    assert reply.status_code == 200 and choice["text"] == "" and len(choice["token_ids"]) == 4
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    # The others go on, and everybody is told.
    assert live.post("/v1/completions", GOOD).status_code == 200
    assert live.get("/ready").json() == {"status": "ready", "unavailable": ["bob"]}
    assert [m["id"] for m in live.get("/v1/models").json()["data"]] == ["ana", "bob"]
    assert scrape(live)[("moetel_tenant_available", "bob")] == 0
    assert scrape(live)[("moetel_tenant_available", "ana")] == 1
    shown = {t["name"]: t["unavailable"] for t in live.get("/status.json").json()["tenants"]}
    assert shown["ana"] is None and "build again" in shown["bob"]


def _as_older(monkeypatch: pytest.MonkeyPatch, store: Path, tenants: dict[str, Path]) -> None:
    """Build a store as older versions did: what is in the small files was not looked at."""
    with monkeypatch.context() as patched:
        patched.setattr("common.build.sources.decide_generation", lambda *_: GenerationConfig())
        build_store(store, tenants)
    made = Manifest.read(store)
    replace(made, tenants=tuple(replace(t, generation=None) for t in made.tenants)).write(store)


def _copy(checkpoint: Path, target: Path, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(checkpoint, target)
    damage(target)
    return target


def test_a_damaged_generation_config(
    damaged: Path,
    served: Callable[..., Live],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = _copy(checkpoints["bob"], tmp_path / "bad", _generation)
    _as_older(monkeypatch, damaged, {"ana": checkpoints["ana"], "bob": bad})
    live = served()
    for body in ({"prompt": "text"}, {"prompt": [5]}, {"prompt": [5], "stream": True}):
        assert "eos_token_id" in unavailable(
            live.post("/v1/completions", GOOD | {"model": "bob"} | body)
        )
    unavailable(live.post("/detokenize", {"model": "bob", "tokens": [5]}))
    assert live.post("/v1/completions", GOOD).status_code == 200
    assert live.get("/ready").json()["unavailable"] == ["bob"]


def test_names_are_for_those_who_may_use_them(damaged: Path, served: Callable[..., Live]) -> None:
    _truncate(_assets(damaged, "bob"))
    secrets, lines = zip(
        *(new_key([name], admin=name == "*") for name in ("ana", "bob", "*")), strict=True
    )
    live = served(ServerSettings(keys=KeyRing([_key("", json.loads(line)) for line in lines])))
    assert live.get("/ready").json() == {"status": "ready"}
    assert live.get("/ready", Authorization="Bearer wrong").json() == {"status": "ready"}
    ana, bob, admin = ({"Authorization": f"Bearer {s}"} for s in secrets)
    assert live.get("/ready", **ana).json() == {"status": "ready"}
    assert live.get("/ready", **bob).json()["unavailable"] == ["bob"]
    assert live.get("/ready", **admin).json()["unavailable"] == ["bob"]
    body = GOOD | {"model": "bob"}
    assert error(live.post("/v1/completions", body, **ana), 404)["code"] == "model_not_found"
    unavailable(live.post("/v1/completions", body, **bob))
    assert "bob" not in live.get("/status.json", **ana).text


@pytest.mark.parametrize("kind", [*sorted(TOKENIZERS), "template", "generation"])
def test_what_cannot_be_served_is_not_loaded(
    damaged: Path,
    served: Callable[..., Live],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    kind: str,
) -> None:
    path = tmp_path / "new"
    shutil.copytree(checkpoints["new"], path)
    if kind == "template":
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")
    elif kind == "generation":
        (path / "generation_config.json").write_text('{"eos_token_id": [[2]]}')
    else:
        TOKENIZERS[kind](path)
    live = served(ServerSettings(enable_admin=True))
    before = helpers.fingerprint(damaged)
    answer = live.post("/v1/completions", GOOD).json()["choices"]
    found = error(
        live.post("/v1/load_tenant", {"tenant_name": "new", "tenant_path": str(path)}), 400
    )
    assert "new" in found["message"] or str(path) in found["message"]
    assert helpers.fingerprint(damaged) == before
    assert [m["id"] for m in live.get("/v1/models").json()["data"]] == ["ana", "bob"]
    assert error(live.post("/v1/completions", GOOD | {"model": "new"}), 404)
    assert live.post("/v1/completions", GOOD).json()["choices"] == answer


@pytest.mark.parametrize("damage", [_truncate, _generation])
def test_another_tenant_comes_beside_a_damaged_one(
    damaged: Path,
    served: Callable[..., Live],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    bad = _copy(checkpoints["bob"], tmp_path / "bad", damage)
    _as_older(monkeypatch, damaged, {"ana": checkpoints["ana"], "bob": bad})
    live = served(ServerSettings(enable_admin=True))
    reply = live.post(
        "/v1/load_tenant", {"tenant_name": "new", "tenant_path": str(checkpoints["new"])}
    )
    assert reply.status_code == 200, reply.text
    assert live.post("/v1/completions", GOOD | {"model": "new"}).status_code == 200
    assert live.post("/v1/unload_tenant", {"tenant_name": "bob"}).status_code == 200
    assert live.get("/ready").json() == {"status": "ready"}


@pytest.mark.slow
def test_the_command_says_who_is_unavailable(damaged: Path) -> None:
    _truncate(_assets(damaged, "bob"))
    with serving(damaged, "--no-warm-up", "--log-level", "error") as server:
        assert "serves 2 tenants (ana, bob)" in server.first
        code, log = server.stop()
    assert code == 0 and "tenant bob is unavailable: " in log and "build again" in log
