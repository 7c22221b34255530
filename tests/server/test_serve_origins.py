"""Pages of other origins, HEAD, slashes at the end, and text that is no Unicode."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.server.keys import KeyRing, _key, new_key
from scripts.server.settings import ServerSettings
from tests.helpers import examples
from tests.server.live import GOOD, Live, Loop, error

PAGE = {"Origin": "http://localhost:5173"}
PREFLIGHT = PAGE | {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-mine",
}
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def locked(loop: Loop) -> Any:
    """A server with keys whose tenants may change."""
    _, line = new_key(["ana"], admin=True)
    with loop.serve(
        ServerSettings(keys=KeyRing([_key("", json.loads(line))]), enable_admin=True)
    ) as live:
        yield live


def test_a_page_may_ask(live: Live, locked: Live) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/models"):
        for server in (live, locked):  # a preflight has no key
            reply = server.client.request("OPTIONS", path, headers=PREFLIGHT)
            assert reply.status_code == 200 and reply.headers[ALLOWED] == "*"
            assert "POST" in reply.headers["access-control-allow-methods"]
            assert "x-mine" in reply.headers["access-control-allow-headers"]
    reply = live.client.post("/v1/completions", json=GOOD, headers=PAGE)
    assert reply.status_code == 200 and reply.headers[ALLOWED] == "*"
    assert "x-request-id" in reply.headers["access-control-expose-headers"]
    stream = live.client.post("/v1/completions", json=GOOD | {"stream": True}, headers=PAGE)
    assert stream.headers[ALLOWED] == "*" and stream.text.endswith("[DONE]\n\n")
    assert ALLOWED not in live.post("/v1/completions", GOOD).headers


def test_errors_may_be_read_too(live: Live, locked: Live, loop: Loop) -> None:
    for server, path, body, status in (
        (live, "/v1/completions", GOOD | {"model": "nobody"}, 404),
        (live, "/v1/completions", GOOD | {"max_tokens": 0}, 400),
        (live, "/v1/nothing", {}, 404),
        (locked, "/v1/completions", GOOD, 401),
    ):
        reply = server.client.post(path, json=body, headers=PAGE)
        assert error(reply, status) and reply.headers[ALLOWED] == "*"
    with loop.serve(ServerSettings(max_request_bytes=2000)) as short:
        reply = short.client.post(
            "/v1/completions", json=GOOD | {"prompt": "x" * 3000}, headers=PAGE
        )
        assert error(reply, 413) and reply.headers[ALLOWED] == "*"


@pytest.mark.parametrize(
    "path", ["/v1/load_tenant", "/v1/unload_tenant", "/v1/unload_tenant/", "/v1/unload%5Ftenant"]
)
def test_no_page_changes_tenants(loop: Loop, path: str) -> None:
    with loop.serve(ServerSettings(enable_admin=True)) as live:
        reply = live.client.request("OPTIONS", path, headers=PREFLIGHT)
        assert reply.status_code == 405 and ALLOWED not in reply.headers
        reply = live.client.post(
            path, json={"tenant_name": "nobody", "tenant_path": "/nowhere"}, headers=PAGE
        )
        assert reply.status_code in (400, 404) and ALLOWED not in reply.headers


def test_which_origins(loop: Loop) -> None:
    mine = ServerSettings(
        allowed_origins=("http://mine",), allowed_methods=("GET",), allowed_headers=("x-mine",)
    )
    with loop.serve(mine) as live:
        assert ALLOWED not in live.client.get("/v1/models", headers=PAGE).headers
        assert (
            live.client.get("/v1/models", headers={"Origin": "http://mine"}).headers[ALLOWED]
            == "http://mine"
        )
        assert live.client.request("OPTIONS", "/v1/models", headers=PREFLIGHT).status_code == 400
    with loop.serve(ServerSettings(allowed_origins=())) as live:
        assert live.client.request("OPTIONS", "/v1/models", headers=PREFLIGHT).status_code == 405
        assert ALLOWED not in live.client.get("/v1/models", headers=PAGE).headers


def test_head_is_get_without_a_body(live: Live, locked: Live) -> None:
    paths = ["/", "/page/style.css"]
    for path, methods in live.get("/openapi.json").json()["paths"].items():
        if "get" in methods:
            paths.append(path.replace("{model}", "ana"))
    assert len(paths) >= 9
    for path in paths:
        head, get = live.client.head(path), live.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
        if path not in ("/metrics", "/status.json"):  # whose numbers move
            assert head.headers["content-length"] == get.headers["content-length"]
    assert live.client.head("/v1/completions").status_code == 405
    assert live.client.head("/v1/nothing").status_code == 404
    assert locked.client.head("/v1/models").status_code == 401


def test_a_slash_at_the_end(live: Live) -> None:
    assert live.get("/v1/models/").json() == live.get("/v1/models").json()
    assert live.get("/v1/models/ana/").json()["id"] == "ana"
    for path in ("/v1/completions/", "/v1/completions//"):
        reply = live.client.post(path, json=GOOD, follow_redirects=False)
        assert reply.status_code == 200
    assert live.get("/ready/").status_code == 200


# Half an emoji.

HALF = "\ud83d"
CHAT = {"model": "bob", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def _send(live: Live, path: str, body: Any) -> Any:
    return live.client.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/v1/completions", GOOD | {"prompt": "a" + HALF}, "prompt"),
        ("/v1/completions", GOOD | {"prompt": ["a", HALF + "b"], "echo": True}, "prompt.1"),
        ("/v1/completions", GOOD | {"stop": HALF}, "stop"),
        ("/v1/completions", GOOD | {"stop": ["a", HALF]}, "stop.1"),
        ("/v1/completions", GOOD | {"model": "ana" + HALF}, "model"),
        ("/v1/completions", GOOD | {"logit_bias": {HALF: 1}}, "logit_bias"),
        ("/v1/completions", GOOD | {"user": HALF}, "user"),
        ("/v1/completions", GOOD | {"request_id": HALF}, "request_id"),
        ("/v1/completions", GOOD | {HALF: 1}, "the body"),
        ("/v1/completions", GOOD | {"unknown": {"a": [[HALF]]}}, "unknown.a.0.0"),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": HALF}]},
            "messages.0.content",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": HALF, "content": "x"}]},
            "messages.0.role",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "name": HALF, "content": "x"}]},
            "messages.0.name",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            "messages.0.content.0.text",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"tools": [{"function": {"name": HALF}}]},
            "tools.0.function.name",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"chat_template_kwargs": {"x": HALF}},
            "chat_template_kwargs.x",
        ),
        ("/tokenize", {"model": "bob", "prompt": HALF}, "prompt"),
        ("/v1/unload_tenant", {"tenant_name": HALF}, "tenant_name"),
    ],
)
def test_half_an_emoji_is_named(live: Live, path: str, body: Any, param: str) -> None:
    found = error(_send(live, path, body), 400)
    assert found["param"] == param and "half a surrogate pair" in found["message"]


def test_whole_emojis_pass(live: Live) -> None:
    for prompt in (
        "\U0001f600",
        "\\ud83d",
        "\\\\ud83d",
        "\ufeff",
        "a\0b",
        "\ufffd",
        "\ud7ff\ue000",
    ):
        reply = _send(live, "/v1/completions", GOOD | {"prompt": prompt})
        assert reply.status_code == 200, prompt
        assert reply.json()["usage"]["prompt_tokens"] == len(prompt.encode())


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "ana", "prompt": "\xed\xa0\xbd"}',  # as CESU-8 writes it
        b'{"model": "ana", "prompt": "\\uD83D \\uDE00"}',
        b'{"model": "ana", "prompt": "\\uDE00\\uD83D"}',
        '{"model": "ana", "prompt": "\ud83d"}'.encode("utf-16", "surrogatepass"),
        '{"model": "ana", "prompt": "\ud83d"}'.encode("utf-32-le", "surrogatepass"),
    ],
)
def test_half_an_emoji_in_other_bytes(live: Live, content: bytes) -> None:
    reply = live.client.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert error(reply, 400)["param"] == "prompt"


TEXT = st.text(st.characters(), max_size=4) | st.sampled_from(
    ["\ud83d", "\0", "\udc00a", "~", "\U0001f600"]
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | TEXT,
    lambda v: st.lists(v, max_size=2) | st.dictionaries(TEXT, v, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(
    [
        *(
            "prompt",
            "stop",
            "messages",
            "logit_bias",
            "tools",
            "documents",
            "chat_template_kwargs",
            "suffix",
        ),
        *(
            "response_format",
            "tool_choice",
            "user",
            "reasoning_effort",
            "request_id",
            "stream_options",
            "name",
        ),
        *("truncation_side", "tenant_name", "tenant_path", "tokens"),
    ]
)
ROUTES = [
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v1/load_tenant",
    "/v1/unload_tenant",
]


def test_no_text_breaks_the_server(loop: Loop) -> None:
    with loop.serve(ServerSettings(enable_admin=True)) as live:

        @settings(
            max_examples=examples(120),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            path=st.sampled_from(ROUTES), fields=st.dictionaries(FIELDS | TEXT, VALUE, max_size=3)
        )
        def check(path: str, fields: dict[str, Any]) -> None:
            body = {
                "model": "bob",
                "max_tokens": 1,
                "tenant_name": "nobody",
                "tenant_path": "/nowhere",
            }
            body |= {"prompt": "x"} if path == "/v1/completions" else {}
            body |= {"messages": CHAT["messages"]} if path == "/v1/chat/completions" else {}
            reply = _send(live, path, body | fields)
            assert reply.status_code < 500, (path, fields, reply.text)
            if "\\ud83d" in json.dumps(fields).replace("\\ud83d\\ude00", ""):
                assert reply.status_code == 400

        check()


@pytest.mark.parametrize("path", ["a\0b", "~nobody-here/x", "x" * 4000, "/" + "x/" * 2000])
def test_paths_that_are_none(loop: Loop, path: str) -> None:
    with loop.serve(ServerSettings(enable_admin=True)) as live:
        reply = live.post("/v1/load_tenant", {"tenant_name": "x", "tenant_path": path})
        assert error(reply, 400)["param"] == "tenant_path"
