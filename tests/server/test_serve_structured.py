"""`response_format` and `structured_outputs` over HTTP, by requests and by OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.live import Live, error, events

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GOOD: dict[str, Any] = {"model": "bob", "prompt": "hello", "max_tokens": 300, "temperature": 1}
CHAT: dict[str, Any] = {
    "model": "bob",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 300,
    "temperature": 1,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_of_the_schema(live: Live, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    more = {"seed": seed, "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
    whole = live.post("/v1/completions", GOOD | more).json()["choices"][0]
    jsonschema.validate(json.loads(whole["text"]), SCHEMA)
    assert whole["finish_reason"] == "stop"
    with live.client.stream(
        "POST", "/v1/completions", json=GOOD | more | {"stream": True}
    ) as reply:
        *found, last = events("".join(reply.iter_text()))
    assert last == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["text"] for e in found) == whole["text"]
    chat = live.post("/v1/chat/completions", CHAT | more | {"n": 2}).json()["choices"]
    for choice in chat:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_openai_client(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    format: Any = FORMAT
    for seed in range(3):
        chat = client.chat.completions.create(**CHAT, seed=seed, response_format=format)
        if chat.choices[0].finish_reason == "stop":  # blanks of a random model may fill the answer
            found = json.loads(str(chat.choices[0].message.content))
            assert set(found) == {"name", "age"}
    choice = client.completions.create(
        **GOOD, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert choice.choices[0].text in ("yes", "no")
    text: Any = {"type": "text"}
    assert client.chat.completions.create(**CHAT | {"max_tokens": 2}, response_format=text)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "goes with the type"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"structured_outputs": {}}, None, "give exactly one of"),
        ({"structured_outputs": {"regex": "("}}, None, "regex cannot be used"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, None, "has regex and choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "leave it out"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, None, "leave one out"),
        ({"model": "ids", "prompt": [5], "structured_outputs": {"regex": "a"}}, None, "tokenizer"),
    ],
)
def test_what_cannot_be_done_is_named(
    live: Live, fields: dict[str, Any], param: str | None, says: str
) -> None:
    found = error(live.post("/v1/completions", GOOD | fields), 400)
    assert says in found["message"], found
    if param is not None:
        assert str(found["param"]).startswith(param), found
