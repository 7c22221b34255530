"""Tools over HTTP, by OpenAI's client. `structured_outputs` fixes what a random model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from common import load_engine
from scripts.server.settings import ServerSettings
from tests.server.live import Live, Loop, error
from tests.server.scripted import tenants_of

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

TEMPLATE = (
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }} "
    "{{ c.function.arguments.city }}>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
SAID = (
    'I look.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
)
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 1,
    "max_tokens": 400,
}


def saying(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"choice": [text]}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Live]]:
    """With the format of Hermes and with none. `plain` has a template without tools."""
    root = tmp_path_factory.mktemp("tools")
    store = tenants_of(root, {"ana": TEMPLATE, "plain": None})
    loop = Loop(load_engine(store, device="cpu"))
    with (
        loop.serve(ServerSettings(tool_call_parser="hermes")) as hermes,
        loop.serve(ServerSettings()) as without,
    ):
        yield hermes, without
    loop.close()


@pytest.fixture
def client(served: tuple[Live, Live]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0].url}/v1", api_key="none", max_retries=0)


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[str, dict[int, Any], str | None]:
    """Content, calls by index, and why it ended, put together from a stream."""
    content, reason = "", None
    calls: dict[int, Any] = {}
    for chunk in client.chat.completions.create(model="ana", stream=True, **asked):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            known = calls.setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


def test_calls_that_a_model_makes_by_itself(client: openai.OpenAI) -> None:
    asked = ASK | {"tools": TOOLS, "extra_body": saying(SAID)}
    whole = client.chat.completions.create(model="ana", **asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "I look."
    assert whole.message.tool_calls
    found = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]  # type: ignore[union-attr]
    assert found == [("weather", '{"city": "Oslo"}'), ("time", "{}")]
    assert len({c.id for c in whole.message.tool_calls}) == 2
    content, calls, reason = streamed(client, **asked)
    assert content == "I look." and reason == "tool_calls"
    assert [(c["name"], c["arguments"]) for c in calls.values()] == found
    one = client.chat.completions.create(model="ana", parallel_tool_calls=False, **asked)
    assert [c.function.name for c in one.choices[0].message.tool_calls or ()] == ["weather"]  # type: ignore[union-attr]
    off = client.chat.completions.create(model="ana", tool_choice="none", **asked).choices[0]
    assert off.message.content == SAID and off.finish_reason == "stop"
    assert off.message.tool_calls is None
    text = ASK | {"tools": TOOLS, "extra_body": saying("No tool is needed.")}
    plain = client.chat.completions.create(model="ana", **text).choices[0]
    assert plain.message.content == "No tool is needed." and plain.finish_reason == "stop"


def test_calls_that_are_asked_for(client: openai.OpenAI) -> None:
    for seed in range(3):
        asked = ASK | {"tools": TOOLS, "seed": seed}
        choice: Any = {"type": "function", "function": {"name": "weather"}}
        named = client.chat.completions.create(model="ana", tool_choice=choice, **asked)
        if named.choices[0].finish_reason != "length":
            assert named.choices[0].finish_reason == "stop"
            (call,) = named.choices[0].message.tool_calls or ()
            assert call.function.name == "weather"  # type: ignore[union-attr]
            assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")  # type: ignore[union-attr]
            _, calls, reason = streamed(client, tool_choice=choice, **asked)
            assert reason == "stop" and list(calls) == [0]
            assert calls[0]["arguments"] == call.function.arguments  # type: ignore[union-attr]
        required = client.chat.completions.create(
            model="ana", tool_choice="required", parallel_tool_calls=False, **asked
        ).choices[0]
        if required.finish_reason != "length":  # blanks may fill the answer
            assert required.finish_reason == "tool_calls"
            (call,) = required.message.tool_calls or ()
            assert call.function.name in ("weather", "time")  # type: ignore[union-attr]
            json.loads(call.function.arguments)  # type: ignore[union-attr]


def test_calls_go_back_into_the_conversation(served: tuple[Live, Live]) -> None:
    live, _ = served
    said = live.post(
        "/v1/chat/completions", ASK | {"model": "ana", "tools": TOOLS} | saying(SAID)
    ).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
    body = ASK | {
        "model": "ana",
        "messages": [*ASK["messages"], said, result],
        "tools": TOOLS,
        "max_tokens": 1,
        "return_prompt_text": True,
    }
    written = live.post("/v1/chat/completions", body).json()["prompt_text"]
    assert written == (
        "<tool weather><tool time><user>hello<assistant>I look.<call weather Oslo><call time >"
        "<tool>rain<bot>"
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "there is no tool 'x'; there is: weather, time",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "of another structure",
        ),
        ({"model": "plain", "tools": TOOLS}, "reads no 'tools'"),
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
    ],
)
def test_what_cannot_be_done_is_named(
    served: tuple[Live, Live], fields: dict[str, Any], says: str
) -> None:
    reply = served[0].post("/v1/chat/completions", {"model": "ana"} | ASK | fields)
    assert says in error(reply, 400)["message"]


def test_without_a_format_no_calls_are_found(served: tuple[Live, Live]) -> None:
    _, without = served
    body = {"model": "ana", "tools": TOOLS} | ASK | {"max_tokens": 2}
    found = error(without.post("/v1/chat/completions", body), 400)
    assert "--tool-call-parser" in found["message"] and found["param"] == "tool_choice"
    none = without.post("/v1/chat/completions", body | {"tool_choice": "none"})
    assert none.status_code == 200, none.text
