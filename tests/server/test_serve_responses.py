"""OpenAI's Responses API by OpenAI's client, beside the same conversations in chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from common import load_engine
from scripts.server.settings import ServerSettings
from tests.server.live import Live, Loop, error
from tests.server.scripted import END_ID, client, hold_from_the_start, saying, tenants_of

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

TEMPLATE = (
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% if m.reasoning_content %}<thought {{ m.reasoning_content }}>{% endif %}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }} "
    "{{ c.function.arguments.city }}>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
ASK: dict[str, Any] = {
    "model": "ana",
    "input": "hello",
    "temperature": 1,
    "max_output_tokens": 300,
}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SAID = (
    "<think>I look.</think>See:"
    '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("responses")
    store = tenants_of(root, dict.fromkeys(("ana", "bob"), TEMPLATE), marked=["ana", "bob"])
    loop = Loop(load_engine(store, device="cpu"))
    with loop.serve(ServerSettings(reasoning_parser="qwen3", tool_call_parser="hermes")) as found:
        yield found
    loop.close()


@pytest.fixture
def from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    hold_from_the_start(monkeypatch)


def checked(found: Response) -> Response:
    """The client takes whatever comes; its types do not."""
    return Response.model_validate(found.model_dump(mode="json", by_alias=True))


def prompt_of(live: Live, **fields: Any) -> str:
    """What a conversation of chat is written out as."""
    body = {"model": "ana", "max_tokens": 1, "return_prompt_text": True, **fields}
    text: str = live.post("/v1/chat/completions", body).json()["prompt_text"]
    return text


def test_a_text_is_answered_as_by_chat(live: Live) -> None:
    asked = {**ASK, "temperature": 0, "max_output_tokens": 12}
    found = checked(client(live).responses.create(**asked, instructions="Be short."))
    messages: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
    ]
    chat = client(live).chat.completions.create(
        model="ana", messages=messages, temperature=0, max_tokens=12
    )
    assert found.output_text == chat.choices[0].message.content and found.output_text
    assert found.status == "incomplete" and found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None and chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens == 12
    assert found.usage.total_tokens == chat.usage.total_tokens


@pytest.mark.usefixtures("from_the_start")
def test_reasoning_text_and_calls_are_items(live: Live) -> None:
    found = checked(client(live).responses.create(**ASK, tools=[WEATHER], extra_body=saying(SAID)))
    thought, message, call = found.output
    assert thought.type == "reasoning" and thought.content is not None
    assert thought.content[0].text == "I look."
    assert message.type == "message" and found.output_text == "See:"
    assert call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments) == {"city": "Oslo"} and found.status == "completed"
    assert found.usage is not None
    assert found.usage.output_tokens_details.reasoning_tokens == len("I look.") + 2


@pytest.mark.usefixtures("from_the_start")
def test_a_stream_has_the_clients_events_and_ends_as_the_whole(live: Live) -> None:
    whole = client(live).responses.create(**ASK, tools=[WEATHER], extra_body=saying(SAID))
    stream = client(live).responses.create(
        **ASK, tools=[WEATHER], stream=True, extra_body=saying(SAID)
    )
    events = [EVENTS.validate_python(e.model_dump(mode="json", by_alias=True)) for e in stream]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:3] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert kinds.count("response.output_item.added") == 3
    assert kinds.count("response.output_item.done") == 3
    assert kinds[-1] == "response.completed"

    def joined(kind: str) -> str:
        return "".join(e.delta for e in events if e.type == kind)

    assert joined("response.reasoning_text.delta") == "I look."
    assert joined("response.output_text.delta") == "See:"
    assert json.loads(joined("response.function_call_arguments.delta")) == {"city": "Oslo"}

    def shown(response: Any) -> list[Any]:
        return [i.model_dump(exclude={"id", "call_id"}, exclude_none=True) for i in response.output]

    assert shown(events[-1].response) == shown(whole)
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [i.id for i in done] == [i.id for i in events[-1].response.output]


@pytest.mark.usefixtures("from_the_start")
def test_the_clients_own_stream_helper_follows(live: Live) -> None:
    with client(live).responses.stream(**ASK, extra_body=saying("Yes, I do.")) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "Yes, I do."


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_and_a_schema(live: Live, stream: bool) -> None:
    close: Any = {"logit_bias": {str(END_ID): 100}, "include_reasoning": False}
    asks: list[dict[str, Any]] = [
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
        {
            "text": {
                "format": {
                    "type": "json_schema",
                    "name": "place",
                    "schema": WEATHER["parameters"],
                    "strict": True,
                }
            }
        },
    ]
    for ask in asks:
        found: Any = client(live).responses.create(**ASK, **ask, stream=stream, extra_body=close)
        if stream:
            found = list(found)[-1].response
        (item,) = checked(found).output
        text = item.arguments if item.type == "function_call" else found.output_text
        assert json.loads(text)["city"] in ("Oslo", "Rome")
        told = found.model_dump(mode="json")["tool_choice"]
        assert told == ask.get("tool_choice", "auto")


def test_items_of_turns_before_reach_the_template(live: Live) -> None:
    items: Any = [
        {"role": "developer", "content": "Help."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "t", "text": "why"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "X"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Y"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    found = client(live).responses.create(**ASK | {"input": items, "max_output_tokens": 1})
    messages = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "why",
            "tool_calls": [
                {
                    "id": f"c{i}",
                    "type": "function",
                    "function": {"name": "weather", "arguments": json.dumps({"city": city})},
                }
                for i, city in ((1, "X"), (2, "Y"))
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    text = prompt_of(live, messages=messages)
    calls = "<call weather X><call weather Y>"
    assert text == f"<system>Help.<user>a<assistant><thought why>{calls}<tool>rain<bot>"
    tokens = live.post("/tokenize", {"model": "ana", "prompt": text, "add_special_tokens": False})
    assert found.usage is not None and found.usage.input_tokens == tokens.json()["count"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp-1"}, "previous_response_id", "not kept"),
        ({"background": True}, "background", "not kept"),
        ({"truncation": "auto"}, "truncation", "input is not cut"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"input": [{"type": "image"}]}, "input[0].type", "is not known"),
        ({"input": [{"type": "function_call"}]}, "input[0].name", "is missing"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content", "list of parts"),
        ({"input": [{"type": "reasoning", "content": [{}]}]}, "input[0].content", "have a text"),
        ({"input": [{"role": 5, "content": "x"}]}, "messages.0.role", "string"),
        ({"input": []}, "input", "input"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "say it in a message"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str, words: str
) -> None:
    found = error(live.post("/v1/responses", ASK | fields), 400)
    assert found["param"] == param and words in found["message"]


def test_unknown_tenants_are_404(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client(live).responses.create(**ASK | {"model": "nobody"})
