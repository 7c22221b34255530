"""Clients as people use them: OpenAI's, vLLM's benchmark, curl, a browser, and one that sends
anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from common import build_store, load_engine
from scripts.server.keys import ALL, Key, KeyRing, new_key
from scripts.server.settings import ServerSettings
from tests import helpers
from tests.server.live import Live, Loop, wait_for


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_openai_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="ana", prompt="hello", temperature=0, max_tokens=8, logprobs=1
    )
    assert (
        whole.usage
        and whole.usage.completion_tokens == 8
        and whole.choices[0].finish_reason == "length"
    )
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.tokens or []) == 8
    stream = client.completions.create(
        model="ana", prompt="hello", temperature=0, max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    more = client.completions.create(
        model="ana", prompt="x", extra_body={"ignore_eos": True, "top_k": 3}
    )
    assert more.usage and more.usage.completion_tokens == 16


def test_openai_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(
        model="bob",
        messages=messages,
        temperature=0,
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=2,
    )
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].logprobs
    assert len(whole.choices[0].logprobs.content or []) == 8
    stream = client.chat.completions.create(
        model="bob",
        messages=messages,
        temperature=0,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content


def test_openai_models_and_errors(client: openai.OpenAI, loop: Loop) -> None:
    assert [m.id for m in client.models.list()] == ["ana", "bob", "ids"]
    assert client.models.retrieve("bob").owned_by == "moetel"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert (
        missing.value.code == "model_not_found"
        and missing.value.param == "model"
        and missing.value.request_id
    )
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="ana", prompt="x", temperature=-1)
    secret, line = new_key(["ana"])
    ring = KeyRing(
        [
            Key(
                "a",
                bytes.fromhex(json.loads(line)["hash"].removeprefix("sha256:")),
                frozenset(["ana"]),
            )
        ]
    )
    with loop.serve(ServerSettings(keys=ring, rate_limit=1)) as locked:
        mine = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=secret, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            mine.with_options(api_key="sk-wrong").completions.create(model="ana", prompt="x")
        assert mine.completions.create(model="ana", prompt="x")
        with pytest.raises(openai.RateLimitError):
            mine.completions.create(model="ana", prompt="x")
    with pytest.raises(openai.APIError, match="deadline"):
        list(
            client.completions.create(
                model="ana",
                prompt="x",
                max_tokens=4000,
                stream=True,
                extra_body={"ignore_eos": True, "deadline_ms": 200},
            )
        )


def test_openai_client_that_stops_reading(client: openai.OpenAI, loop: Loop) -> None:
    stream = client.completions.create(
        model="ana", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: loop.busy() == 0, timeout_s=3)


def test_what_vllms_benchmark_reads(live: Live) -> None:
    """A chunk with choices for each token, also where it has no text, and usage in a chunk without
    choices."""
    body = {
        "model": "ana",
        "prompt": "hello",
        "repetition_penalty": 1.0,
        "max_tokens": 32,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    tokens, usage = 0, None
    with live.client.stream(
        "POST", "/v1/completions", json=body, headers={"x-request-id": "bench-0"}
    ) as reply:
        assert reply.headers["x-request-id"] == "bench-0"
        for line in reply.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            tokens += bool(chunk["choices"])
            usage = usage if chunk["choices"] else chunk["usage"]
    assert tokens == 32 and usage == {
        "prompt_tokens": 5,
        "completion_tokens": 32,
        "total_tokens": 37,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert live.get("/v1/models").json()["data"][0]["root"]


# The documentation.


@pytest.fixture(scope="module")
def documented(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """A server with the tenants that docs/http-server.md names."""
    path = tmp_path_factory.mktemp("documented") / "store"
    build_store(path, {"fr": checkpoints["bob"], "de": checkpoints["ana"]})
    loop = Loop(load_engine(path, device="cpu"))
    with loop.serve() as live:
        yield live
    loop.close()


def _curls() -> list[str]:
    text = (helpers.REPOSITORY / "docs" / "http-server.md").read_text(encoding="utf-8")
    return [
        block
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        if block.startswith("curl ")
    ]


def test_there_are_curl_lines() -> None:
    assert len(_curls()) == 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", _curls())
def test_curl_lines_of_the_documentation(documented: Live, command: str) -> None:
    line = command.replace("http://127.0.0.1:8000", documented.url).replace(
        "curl ", "curl --silent --fail-with-body ", 1
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    if "data: " in done.stdout:
        assert done.stdout.endswith("data: [DONE]\n\n")
    else:
        assert "error" not in json.loads(done.stdout)


def test_metrics_of_the_documentation_are_there(documented: Live) -> None:
    text = (helpers.REPOSITORY / "docs" / "http-server.md").read_text(encoding="utf-8")
    documented.post("/v1/completions", {"model": "fr", "prompt": "x"})
    found = documented.get("/metrics").text
    for name in re.findall(r"`(moetel_[a-z0-9_]+)", text):
        assert re.search(
            rf"^# TYPE {name.removesuffix('_total')}(_total)? ", found, re.MULTILINE
        ), name


# Anything.


@pytest.mark.slow
def test_nothing_that_the_schema_allows_breaks_the_server(live: Live, loop: Loop) -> None:
    schema = schemathesis.openapi.from_dict(live.get("/openapi.json").json())
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/v1/unload_tenant":
            continue

        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if isinstance(case.body, dict):
                if "model" in case.body and len(str(case.body["model"])) % 2:
                    case.body["model"] = "bob"  # else all would be 404
                case.body["max_tokens"] = 3
                case.body["max_completion_tokens"] = 3
            reply = case.call(base_url=live.url, timeout=240)
            seen.add(reply.status_code)
            assert reply.status_code < 500, (case.operation.path, reply.text)
            if reply.status_code >= 400:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

        check()
    assert {200, 400, 404} <= seen
    wait_for(lambda: loop.busy() == 0)


def test_the_schema_is_complete(live: Live) -> None:
    found = live.get("/openapi.json").json()
    assert set(found["paths"]) == {
        *("/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions"),
        "/v1/responses",
        *("/health", "/ready", "/version", "/load", "/metrics", "/tokenize", "/detokenize"),
        *("/v1/load_tenant", "/v1/unload_tenant", "/status.json"),
    }
    fields = found["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "max_tokens", "top_k", "deadline_ms", "stream_options"} <= set(fields)
    assert "422" not in json.dumps(found["paths"]) and "HTTPValidationError" not in json.dumps(
        found
    )
    assert (
        "text/event-stream"
        in found["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    )


# A browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-headless-shell")


def browse(url: str) -> str:
    """The page after its scripts have run for some seconds."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
            ),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", url),
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=True
        ).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_browser(live: Live, loop: Loop) -> None:
    live.post("/v1/completions", {"model": "ana", "prompt": "hello"})
    page = browse(live.url)
    assert re.search(r'id="state"[^>]*>ready<', page)
    rows = re.findall(r'<td data-name="tenant">(.*?)</td>', page)
    assert rows == ["ana", "bob", "ids"]
    assert (
        page.count("<title>layer ") == 8 and page.count('class="missed"') == 3
    )  # two cells, one in the legend
    assert re.search(r'<span class="pool"[^>]*style="flex-grow: 0', page)
    ring = KeyRing([Key("a", b"x" * 32, frozenset([ALL]))])
    with loop.serve(ServerSettings(keys=ring)) as locked:
        page = browse(locked.url)
        assert "key needed" in page and re.search(r'<form id="ask-key">', page)
        assert re.search(r'<div id="content" hidden', page)
