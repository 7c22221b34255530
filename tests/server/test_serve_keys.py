"""API keys, what they may do, and limits of rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import cli
from scripts.server.keys import ALL, Key, KeyFileError, KeyRing, new_key
from scripts.server.rate_limiter import RateLimiter
from scripts.server.settings import ServerSettings
from tests.server.live import GOOD, Live, Loop, error


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def ring(secrets: dict[str, str]) -> KeyRing:
    keys = []
    for name, tenants, admin in (
        ("a", ["ana"], False),
        ("ab", ["ana", "bob"], False),
        ("root", [ALL], True),
    ):
        secrets[name], line = new_key(tenants, admin, name)
        entry = json.loads(line)
        keys.append(
            Key(
                name,
                bytes.fromhex(entry["hash"].removeprefix("sha256:")),
                frozenset(tenants),
                admin,
            )
        )
    return KeyRing(keys)


@pytest.fixture
def locked(loop: Loop, ring: KeyRing) -> Any:
    with loop.serve(ServerSettings(keys=ring, enable_admin=True)) as live:
        yield live


def test_made_keys_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    secrets = []
    for arguments in (
        ["--tenant", "fr"],
        ["--tenant", "fr", "--tenant", "de", "--name", "two"],
        ["--admin"],
    ):
        assert cli.main(["keys", "new", *arguments]) == 0
        out, err = capsys.readouterr()
        with path.open("a") as file:
            file.write(out)
        secrets.append(err.split()[-1])
        assert secrets[-1] not in out
    found = KeyRing.read(path)
    first, second, third = [found.find(s) for s in secrets]
    assert first and second and third and found.find("moetel-x") is None and found.find("") is None
    assert first.allows("fr") and not first.allows("de") and not first.admin
    assert second.name == "two" and second.allows("de")
    assert third.admin and third.allows("anything")
    listed = tmp_path / "list"
    listed.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    assert KeyRing.read(listed).keys == found.keys


def test_a_key_must_be_for_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["keys", "new"])
    assert "--tenant NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hash": "hunter2"}, "hash is not sha256:"),
        ({"hash": None}, "hash is not sha256:"),
        ({"tenants": []}, "tenants is not a list of names"),
        ({"tenants": "fr"}, "tenants is not a list of names"),
        ({"admin": "yes"}, "admin is neither"),
        ({"name": ""}, "name is missing"),
        ({"key": "hunter2"}, "a field that means nothing"),
    ],
)
def test_entries_that_are_no_keys(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\n\n" + json.dumps(json.loads(new_key(["fr"])[1]) | change) + "\n")
    with pytest.raises(KeyFileError) as caught:
        KeyRing.read(path)
    assert says in str(caught.value) and f"{path}:3" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text, says", [("", "holds no key"), ("moetel-abc\n", "no JSON"), ("[1]", "no JSON object")]
)
def test_files_that_are_no_keys(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=says):
        KeyRing.read(path)
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyRing.read(tmp_path / "absent")


def test_names_of_keys_differ(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("\n".join(new_key(["fr"], name="same")[1] for _ in range(2)))
    with pytest.raises(KeyFileError, match="'same' is given to two keys"):
        KeyRing.read(path)


@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer moetel-wrong", "Basic eDp5", "moetel-x", "Bearer é"]
)
def test_without_a_key_there_is_nothing_to_see(locked: Live, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/ana"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/load_tenant"),
        ("POST", "/v1/unload_tenant"),
        ("GET", "/load"),
        ("GET", "/metrics"),
        ("GET", "/status.json"),
        ("GET", "/no/such/route"),
    ):
        reply = locked.client.request(
            method, path, headers=headers, content=b"{broken" if method == "POST" else None
        )
        found = error(reply, 401)
        assert found["code"] == "invalid_api_key" and reply.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/version", "/", "/page/script.js", "/openapi.json"):
        assert locked.client.get(path, headers=headers).status_code == 200


def test_a_key_sees_its_own_tenants_alone(locked: Live, secrets: dict[str, str]) -> None:
    mine = bearer(secrets["a"])
    assert [m["id"] for m in locked.get("/v1/models", **mine).json()["data"]] == ["ana"]
    assert locked.post("/v1/completions", GOOD, **mine).status_code == 200
    unknown = error(locked.post("/v1/completions", GOOD | {"model": "zzz"}, **mine), 404)
    foreign = error(locked.post("/v1/completions", GOOD | {"model": "bob"}, **mine), 404)
    assert foreign["message"].replace("bob", "zzz") == unknown["message"]
    assert error(locked.get("/v1/models/bob", **mine), 404)
    assert error(locked.post("/tokenize", {"model": "bob", "prompt": "x"}, **mine), 404)
    assert error(locked.get("/status.json?tenant=bob", **mine), 404)
    status = locked.get("/status.json?tenant=ana", **mine)
    assert [t["name"] for t in status.json()["tenants"]] == ["ana"]
    assert "bob" not in status.text and "ids" not in status.text
    assert list(locked.get("/load", **mine).json()["tenants"]) == ["ana"]
    assert (
        locked.post("/v1/completions", GOOD | {"model": "bob"}, **bearer(secrets["ab"])).status_code
        == 200
    )


def test_only_admin_keys_see_metrics_and_change_tenants(
    locked: Live, secrets: dict[str, str]
) -> None:
    mine, root = bearer(secrets["ab"]), bearer(secrets["root"])
    assert error(locked.get("/metrics", **mine), 403)["code"] == "insufficient_permissions"
    assert locked.get("/metrics", **root).status_code == 200
    body = {"tenant_name": "x", "tenant_path": "/nowhere"}
    assert error(locked.post("/v1/load_tenant", body, **mine), 403)
    assert error(locked.post("/v1/unload_tenant", {"tenant_name": "ana"}, **mine), 403)
    assert "tenant_path" in error(locked.post("/v1/load_tenant", body, **root), 400)["message"]


def test_a_bucket_fills_again() -> None:
    now = 0.0
    limiter = RateLimiter(6, clock=lambda: now)
    assert [limiter.take("a") for _ in range(6)] == [0.0] * 6
    assert limiter.take("a") == pytest.approx(10.0) and limiter.take("b") == 0.0
    now = 4.0
    assert limiter.take("a") == pytest.approx(6.0)
    now = 10.0
    assert limiter.take("a") == 0.0 and limiter.take("a") > 0
    now = 10_000.0
    assert [limiter.take("a") > 0 for _ in range(7)] == [False] * 6 + [True]
    assert RateLimiter(None).take("a") == 0.0


def test_rates_are_limited_by_tenant_without_keys(loop: Loop) -> None:
    with loop.serve(ServerSettings(rate_limit=2)) as live:
        assert [live.post("/v1/completions", GOOD).status_code for _ in range(3)] == [200, 200, 429]
        reply = live.post("/v1/completions", GOOD | {"stream": True})
        assert (
            error(reply, 429)["code"] == "rate_limit_exceeded"
            and 1 <= int(reply.headers["retry-after"]) <= 30
        )
        assert "2 requests a minute" in reply.json()["error"]["message"]
        assert live.post("/v1/completions", GOOD | {"model": "bob"}).status_code == 200
        for _ in range(3):
            assert live.post("/v1/completions", GOOD | {"model": "nobody"}).status_code == 404


def test_rates_are_limited_by_key(loop: Loop, ring: KeyRing, secrets: dict[str, str]) -> None:
    with loop.serve(ServerSettings(keys=ring, rate_limit=1)) as live:
        assert live.post("/v1/completions", GOOD, **bearer(secrets["ab"])).status_code == 200
        again = live.post("/v1/completions", GOOD | {"model": "bob"}, **bearer(secrets["ab"]))
        assert error(again, 429) and "key" in again.json()["error"]["message"]
        assert live.post("/v1/completions", GOOD, **bearer(secrets["a"])).status_code == 200
