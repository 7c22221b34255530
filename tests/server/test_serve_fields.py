"""Every field of OpenAI's and vLLM's requests: supported, refused by name, or without meaning
here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import openai.types
import openai.types.chat
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from scripts.server.chat_requests import (
    ChatRequest,
    Conversation,
    DetokenizeRequest,
    TokenizeRequest,
)
from scripts.server.refused_fields import MEANINGLESS, Refused
from scripts.server.requests import CompletionRequest, StreamOptions, Taken
from tests import helpers
from tests.server.live import Live, error
from tests.server.speaking import CHAT, COMPLETION

MODELS: Mapping[str, type[Taken]] = {
    "CompletionRequest": CompletionRequest,
    "ChatCompletionRequest": ChatRequest,
    "StreamOptions": StreamOptions,
    "TokenizeCompletionRequest": TokenizeRequest,
    "TokenizeChatRequest": TokenizeRequest,
    "DetokenizeRequest": DetokenizeRequest,
}


def _fields() -> Iterator[tuple[str, str, str]]:
    """(whose schema, its class, the field)."""
    data = json.loads((helpers.DATA / "request_fields.json").read_text(encoding="utf-8"))
    for whose, classes in data.items():
        for name, fields in classes.items():
            if name != "source":
                yield from ((whose, name, field) for field in fields)
    # The package may be newer than the list.
    installed = {
        "CompletionRequest": openai.types.completion_create_params.CompletionCreateParamsStreaming,
        "ChatCompletionRequest": chat_params.CompletionCreateParamsStreaming,
        "StreamOptions": ChatCompletionStreamOptionsParam,
    }
    for name, params in installed.items():
        yield from (("openai, installed", name, field) for field in params.__annotations__)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_field_is_decided(name: str) -> None:
    model = MODELS[name]
    listed = {field for _, n, field in _fields() if n == name}
    assert len(listed) >= 2
    for field in listed:
        places = [field in model.model_fields, field in model.refused, field in MEANINGLESS]
        assert sum(places) == 1, (
            f"{name}.{field} is in {sum(places)} of: supported, refused, meaningless"
        )


def test_what_is_refused_is_of_a_schema() -> None:
    """No name is kept that nobody sends."""
    listed = {field for _, _, field in _fields()}
    for model in MODELS.values():
        assert set(model.refused) <= listed
    assert set(MEANINGLESS) <= listed


def test_neutral_values() -> None:
    assert (
        not Refused("").applies(None)
        and not Refused("").applies([])
        and not Refused("").applies(False)
    )
    assert Refused("").applies(0) and Refused("").applies(True) and Refused("", (True,)).applies(1)
    assert not Refused("", (1,)).applies(1.0)


# A value that changes something, where one that fits all does not.
VALUES: Mapping[str, Any] = {
    "length_penalty": 2.0,
    "thinking_token_budget": 5,
    "stream_interval": 4,
    "spaces_between_special_tokens": False,
    "include_reasoning": False,
    "add_generation_prompt": False,
    "modalities": ["text", "audio"],
}


@pytest.mark.parametrize(
    "path, body, model",
    [
        ("/v1/completions", COMPLETION, CompletionRequest),
        ("/v1/chat/completions", CHAT, ChatRequest),
        ("/tokenize", {"model": "words", "messages": CHAT["messages"]}, TokenizeRequest),
    ],
)
def test_what_is_refused_and_what_passes(
    words: Live, path: str, body: dict[str, Any], model: type[Taken]
) -> None:
    for name, refused in model.refused.items():
        found = error(words.post(path, body | {name: VALUES.get(name, ["x"])}), 400)
        assert found["param"] == name and refused.why in found["message"]
    # Values that change nothing: all fields at once, for each has several.
    for i in range(max(len(r.neutral) for r in model.refused.values()) + 1):
        values = {n: (None, *r.neutral)[min(i, len(r.neutral))] for n, r in model.refused.items()}
        reply = words.post(path, body | values | {"max_tokens": 1})
        assert reply.status_code == 200, reply.text
    if path == "/tokenize":
        return
    whole = words.post(path, body).json()["choices"]
    assert (
        words.post(path, body | {name: {"any": ["thing"]} for name in MEANINGLESS}).json()[
            "choices"
        ]
        == whole
    )
    for options in ({"continuous_usage_stats": True}, {"continuous_usage_stats": "x"}):
        reply = words.post(path, body | {"stream": True, "stream_options": options})
        assert error(reply, 400)["param"] == "stream_options.continuous_usage_stats"
    assert words.post(
        path,
        body
        | {
            "stream": True,
            "stream_options": {"continuous_usage_stats": False, "include_obfuscation": True},
        },
    ).text.endswith("[DONE]\n\n")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_tools_that_must_be_called_are_refused(words: Live, choice: Any) -> None:
    assert (
        error(words.post("/v1/chat/completions", CHAT | {"tool_choice": choice}), 400)["param"]
        == "tool_choice"
    )
    assert error(words.post("/v1/chat/completions", CHAT | {"function_call": {"name": "f"}}), 400)


def test_fields_of_the_other_route(words: Live) -> None:
    found = error(words.post("/v1/completions", COMPLETION | {"max_completion_tokens": 5}), 400)
    assert "/v1/chat/completions" in found["message"]
    assert (
        "/v1/completions"
        in error(words.post("/v1/chat/completions", CHAT | {"echo": True}), 400)["message"]
    )
    found = error(
        words.post("/tokenize", {"model": "words", "prompt": "x", "add_generation_prompt": True}),
        400,
    )
    assert found["param"] == "add_generation_prompt"


def test_unused_settings_are_logged(words: Live, caplog: pytest.LogCaptureFixture) -> None:
    words.app.state.service.warn_of_unused("warm")
    words.app.state.service.warn_of_unused("words")
    (said,) = [r.message for r in caplog.records if "not applied" in r.message]
    assert said.startswith("tenant warm: ") and "num_beams" in said


# The documentation.


def test_the_documentation_names_every_field() -> None:
    text = (helpers.REPOSITORY / "docs" / "http-server.md").read_text(encoding="utf-8")
    names = {
        n for m in (CompletionRequest, ChatRequest, StreamOptions, Conversation) for n in m.refused
    }
    names |= {n for m in (CompletionRequest, ChatRequest, TokenizeRequest) for n in m.model_fields}
    missing = sorted(n for n in names | set(MEANINGLESS) if f"`{n}`" not in text)
    assert not missing
