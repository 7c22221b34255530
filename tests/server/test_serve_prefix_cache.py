"""What requests over HTTP find in the prefix cache, and where it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import Live, error, events

LONG = "all the people of the town came to the square when they heard of it. "  # a token a byte


def asked(live: Live, prompt: Any, **more: Any) -> tuple[dict[str, Any], list[str]]:
    body = {"model": "ana", "prompt": prompt, "temperature": 0, "max_tokens": 4, **more}
    found = live.post("/v1/completions", body).json()
    return found["usage"], [choice["text"] for choice in found["choices"]]


def cached(live: Live, prompt: Any, **more: Any) -> int:
    return int(asked(live, prompt, **more)[0]["prompt_tokens_details"]["cached_tokens"])


def counted(live: Live) -> dict[str, tuple[float, float]]:
    """Queries and hits by tenant."""
    families = {f.name: f for f in text_string_to_metric_families(live.get("/metrics").text)}
    queries, hits = (
        {s.labels["model_name"]: s.value for s in families[f"moetel_prefix_cache_{what}"].samples}
        for what in ("queries", "hits")
    )
    return {name: (queries[name], hits[name]) for name in queries}


def test_usage_says_what_was_found(live: Live) -> None:
    first, texts = asked(live, LONG + "1")
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    again, same = asked(live, LONG + "1")
    assert again["prompt_tokens_details"] == {"cached_tokens": 64} and same == texts
    assert again["prompt_tokens"] == first["prompt_tokens"] == len(LONG) + 1
    assert cached(live, LONG[:40] + "else") == 32
    assert cached(live, "x" + LONG) == 0


def test_a_stream_says_it_too(live: Live) -> None:
    body = {
        "model": "ana",
        "prompt": "s" + LONG,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for expected in (0, 64):
        *_, last, done = events(live.post("/v1/completions", body).text)
        assert done == "[DONE]"
        assert json.loads(last)["usage"]["prompt_tokens_details"] == {"cached_tokens": expected}


def test_conversations_go_on_from_what_was_answered(live: Live) -> None:
    client = OpenAI(base_url=f"{live.url}/v1", api_key="none")
    messages: list[Any] = [{"role": "user", "content": "c" + LONG}]
    first = client.chat.completions.create(
        model="bob", messages=messages, max_tokens=8, temperature=0
    )
    assert first.usage and first.usage.prompt_tokens_details
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    messages += [
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go on"},
    ]
    more = client.chat.completions.create(
        model="bob", messages=messages, max_tokens=8, temperature=0
    )
    assert more.usage and more.usage.prompt_tokens_details
    assert (more.usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_answers_of_one_prompt_count_what_the_first_of_them_found(live: Live) -> None:
    before = counted(live)["ana"]
    usage, _ = asked(live, "n" + LONG, n=3)
    assert usage["prompt_tokens"] == len(LONG) + 1
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    after = counted(live)["ana"]
    assert after[0] - before[0] == 3 * (len(LONG) + 1)
    assert after[1] - before[1] == 2 * 64
    assert cached(live, "n" + LONG, n=2) == 64


def test_tenants_and_salts_find_nothing_of_one_another(live: Live) -> None:
    before = counted(live)
    assert cached(live, "t" + LONG) == 0
    assert cached(live, "t" + LONG, model="bob") == 0
    assert cached(live, "t" + LONG, cache_salt="x") == 0
    assert cached(live, "t" + LONG, cache_salt="x") == 64
    after = counted(live)
    found = {n: (after[n][0] - before[n][0], after[n][1] - before[n][1]) for n in after}
    tokens = len(LONG) + 1
    assert found["ana"] == (3 * tokens, 64) and found["bob"] == (tokens, 0)


@pytest.mark.parametrize("salt", [5, "", ["x"]])
def test_a_salt_is_text(live: Live, salt: Any) -> None:
    body = {"model": "ana", "prompt": "hi", "cache_salt": salt}
    assert "cache_salt" in error(live.post("/v1/completions", body), 400)["message"]
