"""Reasoning over HTTP, by OpenAI's client. `structured_outputs` fixes what a random model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from common import SamplingParams, StructuredOutputs, load_engine
from scripts.server.reasoning import Reasoning
from scripts.server.settings import ServerSettings
from tests.server.live import Live, Loop, error
from tests.server.scripted import END_ID, client, hold_from_the_start, saying, tenants_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% if m.reasoning_content %}<thought {{ m.reasoning_content }}>{% endif %}{% endfor %}"
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
    "{% if opened %}<think>\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
SAID = "<think>\nI sum: 1 + 1.\n</think>\n\nTwo."
THOUGHT, ANSWER = "\nI sum: 1 + 1.\n", "\n\nTwo."

# What each format makes of an answer behind a prompt: reasoning and content.
CASES = [
    ("qwen3", "<bot>", SAID, THOUGHT, ANSWER),
    ("qwen3", "<bot>", "\n" + SAID, THOUGHT, ANSWER),
    ("qwen3", "<bot>", "Two. <think>no</think>", "", "Two. <think>no</think>"),
    ("qwen3", "<bot>", "<thin", "", "<thin"),
    ("qwen3", "<bot>", "<think>on and on", "on and on", ""),
    ("qwen3", "<bot>", "<think>on</thin", "on</thin", ""),
    ("qwen3", "<bot><think>\n", "so</think>Two.", "so", "Two."),
    ("qwen3", "<bot><think>\n\n</think>\n\n", "Two.</think>", "", "Two.</think>"),
    ("qwen3", "<bot>", "", "", ""),
    ("qwen3", "<bot>", "</think>Two.", "", "Two."),
    ("deepseek_r1", "<bot>", SAID, THOUGHT, ANSWER),
    ("deepseek_r1", "<bot>", "so</think>Two.</think>", "so", "Two.</think>"),
    ("deepseek_r1", "<bot>", "so < and on", "so < and on", ""),
    ("deepseek_r1", "<bot><think>\n", "so</think>Two.", "so", "Two."),
    ("deepseek_r1", "<bot><think></think>", "Two.", "", "Two."),
]


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "content"), CASES, ids=str)
def test_marks_are_found_however_the_text_is_cut(
    name: str, prompt: str, text: str, reasoning: str, content: str
) -> None:
    for size in range(1, len(text) + 2):
        split = Reasoning(name, prompt)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        found = [split.push(piece, over=False) for piece in pieces] + [split.push("", over=True)]
        assert "".join(r for r, _ in found) == reasoning
        assert "".join(c for _, c in found) == content
        assert Reasoning(name, prompt).push(text, over=True) == (reasoning, content)


def test_what_is_certain_is_not_held_back() -> None:
    split = Reasoning("qwen3", "<bot>")
    assert split.push("<think>I", over=False) == ("I", "")
    assert split.push(" see </", over=False) == (" see ", "")
    assert split.push("b", over=False) == ("</b", "")
    assert split.push("</think>So", over=False) == ("", "So")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("reasoning")
    return tenants_of(root, {"ana": TEMPLATE, "bob": TEMPLATE}, marked=["ana"])


@pytest.fixture(scope="module")
def served(store: Path) -> Iterator[tuple[Live, Live]]:
    """With a format of reasoning and of tools, and with none."""
    pytest.importorskip("llguidance", reason="structured outputs need llguidance")
    loop = Loop(load_engine(store, device="cpu"))
    settings = ServerSettings(reasoning_parser="qwen3", tool_call_parser="hermes")
    with loop.serve(settings) as parsed, loop.serve(ServerSettings()) as without:
        yield parsed, without
    loop.close()


@pytest.fixture
def from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    hold_from_the_start(monkeypatch)


ASK: dict[str, Any] = {
    "model": "ana",
    "messages": [{"role": "user", "content": "1 + 1?"}],
    "temperature": 1,
    "max_tokens": 300,
}


@pytest.mark.usefixtures("from_the_start")
def test_reasoning_is_a_field_of_its_own(served: tuple[Live, Live]) -> None:
    live, without = served
    message = (
        client(live).chat.completions.create(**ASK, extra_body=saying(SAID)).choices[0].message
    )
    assert message.content == ANSWER and message.model_extra == {"reasoning": THOUGHT}
    stream = client(live).chat.completions.create(**ASK, stream=True, extra_body=saying(SAID))
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(d.content or "" for d in deltas) == ANSWER
    thoughts = [(d.model_extra or {}).get("reasoning") or "" for d in deltas]
    assert "".join(thoughts) == THOUGHT and sum(map(bool, thoughts)) > 5
    plain = (
        client(without).chat.completions.create(**ASK, extra_body=saying(SAID)).choices[0].message
    )
    assert plain.content == SAID and not plain.model_extra


@pytest.mark.usefixtures("from_the_start")
def test_reasoning_can_be_left_out(served: tuple[Live, Live]) -> None:
    live, without = served
    hidden = saying(SAID, include_reasoning=False)
    message = client(live).chat.completions.create(**ASK, extra_body=hidden).choices[0].message
    assert message.content == ANSWER and not message.model_extra
    stream = client(live).chat.completions.create(**ASK, stream=True, extra_body=hidden)
    text = "".join(json.dumps(chunk.model_dump()) for chunk in stream)
    assert "I sum" not in text and "reasoning" not in text
    reply = without.post("/v1/chat/completions", ASK | {"include_reasoning": False})
    assert "--reasoning-parser" in error(reply, 400)["message"]


@pytest.mark.usefixtures("from_the_start")
def test_thinking_that_is_switched_off_leaves_content_alone(served: tuple[Live, Live]) -> None:
    fields = saying("Two.", chat_template_kwargs={"enable_thinking": False})
    message = client(served[0]).chat.completions.create(**ASK, extra_body=fields).choices[0].message
    assert message.content == "Two." and not message.model_extra


@pytest.mark.usefixtures("from_the_start")
def test_tools_are_called_behind_the_reasoning(served: tuple[Live, Live]) -> None:
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    said = f"<think>{call} I could call.</think>{call}"
    tools: Any = [{"type": "function", "function": {"name": "time"}}]
    for stream in (False, True):
        answer: Any = client(served[0]).chat.completions.create(
            **ASK, tools=tools, stream=stream, extra_body=saying(said)
        )
        if stream:
            deltas = [chunk.choices[0].delta for chunk in answer]
            calls = [c for d in deltas for c in d.tool_calls or ()]
            thought = "".join((d.model_extra or {}).get("reasoning") or "" for d in deltas)
            content = "".join(d.content or "" for d in deltas)
        else:
            message = answer.choices[0].message
            calls, content = message.tool_calls, message.content or ""
            thought = message.model_extra["reasoning"]
        assert [c.function.name for c in calls] == ["time"] and not content
        assert thought == f"{call} I could call."


def test_a_structure_begins_behind_the_reasoning(served: tuple[Live, Live]) -> None:
    end = {"logit_bias": {str(END_ID): 100}}  # </think> comes at once
    found = client(served[0]).chat.completions.create(
        **ASK, extra_body={**end, "structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert found.choices[0].message.content in ("yes", "no")
    assert found.choices[0].finish_reason == "stop"
    never = {"logit_bias": {str(END_ID): -100}}
    found = client(served[0]).chat.completions.create(
        **ASK | {"max_tokens": 20},
        extra_body={**never, "structured_outputs": {"choice": ["<think>yes"]}},
    )
    text = found.choices[0].message
    assert found.choices[0].finish_reason == "length"
    assert (text.content or "") != "<think>yes"


def test_a_structure_needs_an_end_that_is_a_token(served: tuple[Live, Live]) -> None:
    body = ASK | {"model": "bob", "structured_outputs": {"choice": ["yes"]}}
    assert (
        "is no token of tenant 'bob'"
        in error(served[0].post("/v1/chat/completions", body), 400)["message"]
    )


def test_templates_get_the_reasoning_of_turns_before(served: tuple[Live, Live]) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "c"},
        {"role": "user", "content": "d"},
    ]
    body = {**ASK, "messages": turns, "max_tokens": 1, "return_prompt_text": True}
    reply = served[0].post("/v1/chat/completions", body)
    assert reply.json()["prompt_text"] == "<user>a<assistant>b<thought c><user>d<bot>"


def test_in_python_a_structure_can_begin_behind_a_token(store: Path) -> None:
    pytest.importorskip("llguidance", reason="structured outputs need llguidance")
    with load_engine(store, device="cpu") as engine:
        (end,) = engine.tokenize("ana", "</think>", add_special_tokens=False)
        assert end == END_ID
        wanted = StructuredOutputs(regex="[ab]{3}", behind="</think>")
        params = SamplingParams(
            max_new_tokens=200,
            temperature=1.0,
            seed=1,
            structured_outputs=wanted,
            logit_bias={end: 4.0},
        )
        answers = [engine.generate("ana", f"{i}", params) for i in range(8)]
    # Ends before the mark, and cut answers, say nothing.
    whole = [a.text for a in answers if a.finish_reason == "stop" and "</think>" in (a.text or "")]
    assert len(whole) >= 3
    for text in whole:
        assert text is not None
        before, _, behind = text.partition("</think>")
        assert before and len(behind) == 3 and set(behind) <= {"a", "b"}, text


def test_what_no_tenant_can_do_is_refused_in_words(served: tuple[Live, Live]) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings are not offered"):
        client(served[0]).embeddings.create(model="ana", input="text")
