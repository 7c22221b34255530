"""Requests to a tenant that speaks in words, and their answers."""

from __future__ import annotations

from typing import Any

from tests.server.live import Live

COMPLETION = {
    "model": "words",
    "prompt": "the people",
    "max_tokens": 3,
    "temperature": 0,
    "return_token_ids": True,
}
CHAT = {
    "model": "words",
    "messages": [{"role": "user", "content": "the people"}],
    "max_tokens": 3,
    "temperature": 0,
    "return_token_ids": True,
}


def complete(live: Live, **fields: Any) -> dict[str, Any]:
    reply = live.post("/v1/completions", COMPLETION | fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    return found


def chat(live: Live, **fields: Any) -> dict[str, Any]:
    reply = live.post("/v1/chat/completions", CHAT | fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found
