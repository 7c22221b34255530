"""Calls in answers, whole and cut at any character, in the formats of the model cards."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.server.tools import PARSERS, Call, Parsed, new_parser
from tests.helpers import examples

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "array", "items": {"type": "string"}},
                    "exact": {"type": "boolean"},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
OSLO = Call("weather", '{"city": "Oslo"}')
CASES: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", "Just text, 1 < 2.", "Just text, 1 < 2.", []),
    (
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "",
        [OSLO],
    ),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>\n'
        '<tool_call>\n{"arguments": {}, "name": "time"}\n</tool_call>\n',
        "Let me see.\n",
        [OSLO, Call("time", "{}")],
    ),
    ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ("hermes", '<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
    ("hermes", "a <tool_ b", "a <tool_ b", []),
    ("mistral", "Just text [TOOL", "Just text [TOOL", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}, '
        '{"name": "time", "arguments": {}}]',
        "",
        [OSLO, Call("time", "{}")],
    ),
    ("mistral", 'Hm.[TOOL_CALLS]weather{"city": "Oslo"}', "Hm.", [OSLO]),
    (
        "mistral",
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[ARGS]{}',
        "",
        [OSLO, Call("time", "{}")],
    ),
    ("mistral", "[TOOL_CALLS]weather{", "[TOOL_CALLS]weather{", []),
    (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
        '<parameter=days>\n3\n</parameter>\n<parameter=units>\n["C"]\n</parameter>\n'
        "<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>",
        "I look.\n",
        [Call("weather", '{"city": "Oslo", "days": 3, "units": ["C"], "exact": true}')],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=weather><parameter=city>\n12\n</parameter></function></tool_call>",
        "",
        [Call("weather", '{"city": "12"}')],
    ),
    ("qwen3_coder", "<tool_call><function=time></function></tool_call>", "", [Call("time", "{}")]),
    ("qwen3_coder", "<tool_call>x</tool_call>", "<tool_call>x</tool_call>", []),
]


def parsed(name: str, pieces: list[str]) -> Parsed:
    parser = new_parser(name, TOOLS)
    found = [parser.push(piece) for piece in pieces] + [parser.finish()]
    return Parsed("".join(f.content for f in found), tuple(c for f in found for c in f.calls))


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_are_found_wherever_the_text_is_cut(
    name: str, text: str, content: str, calls: list[Call]
) -> None:
    expected = Parsed(content, tuple(calls))
    assert parsed(name, [text]) == expected
    assert parsed(name, list(text)) == expected
    for at in range(len(text)):
        assert parsed(name, [text[:at], text[at:]]) == expected
    for call in calls:
        json.loads(call.arguments)


PIECES = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{", "}", '"name"', ":", "time", "<", "\n")


@settings(max_examples=examples(200), deadline=None)
@given(
    name=st.sampled_from(sorted(PARSERS)),
    parts=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12),
)
def test_any_text_gives_the_same_in_pieces(name: str, parts: list[str]) -> None:
    text = "".join(parts)
    whole = parsed(name, [text])
    assert parsed(name, parts) == whole == parsed(name, list(text))
    if not whole.calls:
        assert whole.content == text, "nothing of an answer is lost"


def test_text_is_not_held_back_longer_than_it_may_be_a_mark() -> None:
    parser = new_parser("hermes", TOOLS)
    assert parser.push("Hello <tool").content == "Hello "
    assert parser.push("box").content == "<toolbox"
