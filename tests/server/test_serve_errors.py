"""What is wrong gets a status, a message that names it, and OpenAI's shape."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.errors import OverloadedError
from scripts.server.settings import ServerSettings
from tests.server.live import GOOD, Live, Loop, error, events, wait_for


@pytest.mark.parametrize(
    "fields, param, says",
    [
        ({"prompt": ""}, "prompt", "give text"),
        ({"prompt": []}, "prompt", "give text"),
        ({"prompt": [[]]}, "prompt", "give text"),
        ({"prompt": [1, "a"]}, "prompt", "give text"),
        ({"prompt": [True]}, "prompt", "give text"),
        ({"prompt": None}, "prompt", "give text"),
        ({"prompt": {"text": "x"}}, "prompt", "give text"),
        ({"prompt": [-1]}, "prompt", "give text"),
        ({"prompt": [100000]}, None, "outside the vocabulary"),
        ({"prompt": "x" * 5000}, None, "context of 4096"),
        ({"model": 5}, "model", "valid string"),
        ({"model": None}, "model", "valid string"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "which is for echo"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 128}, "n", "at most 24 in one request"),
        ({"stop": ""}, "stop", "give a text or a list"),
        ({"stop": ["a"] * 65}, "stop", "give a text or a list"),
        ({"stop": 5}, "stop", "give a text or a list"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not in streams"),
        ({"best_of": 3}, "best_of", "ask for n answers"),
        ({"suffix": "end"}, "suffix", "leave it out"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "valid boolean",
        ),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999": 1}}, None, "outside the vocabulary"),
        ({"min_tokens": 9}, "min_tokens", "above the most tokens"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"priority": 0.5}, "priority", "valid integer"),
        ({"deadline_ms": 0}, "deadline_ms", "greater than 0"),
        ({"guided_json": {"type": "object"}}, "guided_json", "leave it out"),
        ({"model": "ids", "prompt": "text"}, None, "no tokenizer"),
        ({"model": "ids", "prompt": [5], "stop": "a"}, None, "use stop_token_ids"),
        ({"model": "ids", "prompt": [5], "echo": True}, "echo", "no tokenizer"),
    ],
)
def test_wrong_fields_are_named(
    live: Live, fields: dict[str, Any], param: str | None, says: str
) -> None:
    found = error(live.post("/v1/completions", GOOD | fields), 400)
    assert found["type"] == "invalid_request_error" and found["param"] == param
    assert says in found["message"] and (param or "") in found["message"]


@pytest.mark.parametrize(
    "fields, param, says",
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "parts of type text",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages.0.content",
            "parts of type text",
        ),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "field required"),
        ({"model": "ana"}, None, "no chat template"),
    ],
)
def test_wrong_chats_are_named(
    live: Live, fields: dict[str, Any], param: str | None, says: str
) -> None:
    body = {"model": "bob", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    found = error(live.post("/v1/chat/completions", body | fields), 400)
    assert found["param"] == param and says in found["message"]


def test_a_template_that_refuses_is_the_requests_fault(
    live: Live, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ValueError("roles must alternate")

    monkeypatch.setattr(loop.engine.engine.text("bob"), "render", refuse)
    body = {"model": "bob", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    found = error(live.post("/v1/chat/completions", body), 400)
    assert "roles must alternate" in found["message"]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"{", "no JSON"),
        (b"", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b'"x"', "no JSON object"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, ""),
        (b'{"model": "ana", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "ana\\ud800", "prompt": "x"}', "model"),
        (b'{"model": "ana", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "ana", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_bodies_that_are_no_request(live: Live, content: bytes, says: str) -> None:
    reply = live.client.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert says in error(reply, 400)["message"]


def test_a_body_must_be_called_json(live: Live) -> None:
    # A page elsewhere can make a browser send text, not JSON; so it cannot use a server on the
    # reader's machine.
    reply = live.client.post(
        "/v1/completions", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}
    )
    assert "Content-Type: application/json" in error(reply, 415)["message"]


def test_unknown_model(live: Live) -> None:
    for reply in (
        live.post("/v1/completions", GOOD | {"model": "nobody"}),
        live.post(
            "/v1/chat/completions",
            {"model": "nobody", "messages": [{"role": "user", "content": "x"}]},
        ),
        live.post("/tokenize", {"model": "nobody", "prompt": "x"}),
        live.get("/v1/models/nobody"),
        live.get("/status.json?tenant=nobody"),
    ):
        found = error(reply, 404)
        assert found["code"] == "model_not_found" and found["param"] == "model"
        assert "ana" not in found["message"]


def test_unknown_routes_and_methods(live: Live) -> None:
    assert "GET /v1/nothing" in error(live.get("/v1/nothing"), 404)["message"]
    found = live.client.put("/v1/models", json={})
    assert "PUT" in error(found, 405)["message"] and found.headers["allow"] == "GET"
    assert error(live.get("/page/../app.py"), 404) and error(live.get("/page/%2e%2e%2fapp.py"), 404)


def test_request_ids_come_back(live: Live) -> None:
    reply = live.client.post("/v1/completions", json=GOOD, headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1" and reply.json()["id"] == "cmpl-mine-1"
    for bad in ("a b", "x" * 200):
        reply = live.client.get("/health", headers={"X-Request-Id": bad})
        assert reply.headers["x-request-id"].startswith("req-")


def test_a_failure_inside_is_an_answer_too(
    live: Live, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("secret detail")

    monkeypatch.setattr(loop.engine, "generate", fail)
    found = error(live.post("/v1/completions", GOOD), 500)
    assert found["type"] == "server_error" and "secret" not in found["message"]
    reply = live.post("/v1/completions", GOOD | {"stream": True})
    assert error(reply, 500)


@pytest.mark.slow
def test_too_many_requests_wait(live: Live, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [GOOD | {"max_tokens": 400, "ignore_eos": True, "n": 8} for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda b: live.post("/v1/completions", b), bodies))
    refused = [r for r in replies if r.status_code == 429]
    assert refused and any(r.status_code == 200 for r in replies)
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        found = error(reply, 429)
        assert found["code"] == "overloaded" and "wait already" in found["message"]
    wait_for(lambda: loop.busy() == 0)


def test_an_overload_is_no_stream(live: Live, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise OverloadedError("9 requests wait already", 9, 2.5)
        yield

    monkeypatch.setattr(loop.engine, "generate", refuse)
    reply = live.post("/v1/completions", GOOD | {"stream": True})
    assert error(reply, 429)["code"] == "overloaded" and reply.headers["retry-after"] == "3"


def test_deadlines(live: Live, loop: Loop) -> None:
    body = GOOD | {"max_tokens": 4000, "ignore_eos": True, "deadline_ms": 300}
    reply = live.post("/v1/completions", body)
    found = error(reply, 408)
    assert reply.headers["x-should-retry"] == "false"  # or OpenAI's client would ask twice more
    assert found["code"] == "deadline_exceeded" and found["param"] == "deadline_ms"
    # A stream has begun by then, so the error is its last event.
    *_, last, done = events(live.post("/v1/completions", body | {"stream": True}).text)
    assert json.loads(last)["error"]["code"] == "deadline_exceeded" and done == "[DONE]"
    wait_for(lambda: loop.busy() == 0)


# Bodies.


def test_long_bodies_are_refused(loop: Loop) -> None:
    with loop.serve(ServerSettings(max_request_bytes=2000)) as live:
        assert live.post("/v1/completions", GOOD | {"prompt": "x" * 1500}).status_code == 200
        found = error(live.post("/v1/completions", GOOD | {"prompt": "x" * 3000}), 413)
        assert found["code"] == "request_too_large" and "2000 bytes" in found["message"]

        def pieces() -> Any:
            for _ in range(4):
                yield b"x" * 1000

        reply = live.client.post(
            "/v1/completions", content=pieces(), headers={"Content-Type": "application/json"}
        )
        assert error(reply, 413) and reply.headers["connection"] == "close"


def test_no_more_of_a_long_body_is_read(loop: Loop) -> None:
    with loop.serve(ServerSettings(max_request_bytes=1000)) as live, _raw(live) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        with pytest.raises(OSError):
            while sent < 200 * 2**20:
                raw.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
        assert sent < 64 * 2**20  # what lay in the sockets' buffers at most


def _raw(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_default_bound_of_a_body() -> None:
    assert ServerSettings().body_limit(4096) == 2**20
    assert ServerSettings().body_limit(131072) == 4 * 2**20
    assert ServerSettings(max_request_bytes=10).body_limit(131072) == 10


def test_bodies_held_at_a_time_are_bounded(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.server.front.MAX_BUFFERED", 5000)
    with _raw(live) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4900\r\n\r\n"
            + b"x" * 4800
        )
        wait_for(lambda: live.app.state.service.requests == 1)
        time.sleep(0.1)
        reply = live.post("/v1/completions", GOOD | {"user": "x" * 300})
        assert error(reply, 503)["code"] == "overloaded" and reply.headers["retry-after"] == "1"
    wait_for(lambda: live.app.state.service.requests == 0)
    assert live.post("/v1/completions", GOOD | {"user": "x" * 300}).status_code == 200


def test_a_slow_body_is_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.server.front.BODY_TIMEOUT_S", 0.2)
    with _raw(live) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")


def test_good_requests_go_on_in_a_flood_of_bad_ones(live: Live, loop: Loop) -> None:
    stop = threading.Event()
    statuses: list[int] = []

    def flood(number: int) -> None:
        with Live(live.app, live.url).client as client:
            while not stop.is_set():
                content = (b'{"model": ' * 50, b"x" * (2**20 + 1))[number % 2]
                headers = {"Content-Type": "application/json"}
                try:
                    statuses.append(
                        client.post("/v1/completions", content=content, headers=headers).status_code
                    )
                except OSError:
                    statuses.append(413)  # the server closed while we wrote
                except Exception as problem:
                    assert "Error" in type(problem).__name__  # the client's words for the same
                    statuses.append(413)

    threads = [threading.Thread(target=flood, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        expected = live.post("/v1/completions", GOOD).json()["choices"][0]["text"]
        end = time.monotonic() + 3
        while time.monotonic() < end:
            reply = live.post("/v1/completions", GOOD)
            assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == expected
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert set(statuses) == {400, 413}
    assert loop.busy() == 0


# Clients that go away.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_goes_away_ends_its_requests(
    live: Live, loop: Loop, stream: bool, n: int
) -> None:
    body = json.dumps(
        GOOD | {"max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": n}
    ).encode()
    with _raw(live) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: loop.busy() == n)
        if stream:
            assert raw.recv(100)
    wait_for(lambda: loop.busy() == 0, timeout_s=3)
    service = live.app.state.service
    wait_for(lambda: service.requests == 0 and not service.runs)


def test_a_client_that_goes_away_while_it_sends(live: Live) -> None:
    with _raw(live) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_for(lambda: live.app.state.service.requests == 1)
    wait_for(lambda: live.app.state.service.requests == 0)
