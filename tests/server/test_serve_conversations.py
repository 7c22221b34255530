"""Forms of messages and of chat templates, beside what transformers writes for the same
conversation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.errors import RequestError
from common.serving.tenant_text import TenantText
from scripts.server.chat_requests import Conversation
from scripts.server.conversation import variables, written
from scripts.server.errors import ApiError
from tests.server import speech

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
# Content in lists: written in the loop, by a macro, or by a variable, with text taken as well or
# not.
PARTS = {
    "loop": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    "macro": "{% macro w(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p['text'] "
    "}}{% endfor %}"
    "{% endif %}{% endmacro %}{% for m in messages %}{{ w(m.content) }}{% endfor %}",
    "variable": "{% for m in messages %}{% set c = m['content'] %}{% if c is not string %}{% for p "
    "in c %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% else %}{{ c }}{% endif %}{% "
    "endfor %}",
}
ONLY_PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
TWO = [{"type": "text", "text": "the "}, {"type": "text", "text": "people"}]


class Speaker:
    """As much of an engine as conversations need."""

    def __init__(self, path: Path):
        self._text = TenantText("t", path)

    def text(self, tenant: str) -> TenantText:
        return self._text


@pytest.fixture
def speaker(tmp_path: Path) -> Any:
    """(template) -> transformers' tokenizer, and the server's way to write a conversation."""
    made = iter(range(100))

    def make(template: str) -> SimpleNamespace:
        path = tmp_path / str(next(made))
        speech.metaspace(template).save_pretrained(path)
        engine: Any = Speaker(path)
        hf = AutoTokenizer.from_pretrained(path)

        def write(messages: list[dict[str, Any]], **fields: Any) -> str:
            return written(
                engine, "t", Conversation.model_validate({"messages": messages, **fields})
            )

        def expected(messages: list[dict[str, Any]]) -> str:
            return str(hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        return SimpleNamespace(write=write, expected=expected)

    return make


@pytest.mark.parametrize("name", sorted(PARTS))
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool", "developer"])
def test_templates_that_read_parts_get_them(speaker: Any, name: str, role: str) -> None:
    found = speaker(PARTS[name])
    for content in (TWO, "the people"):
        messages = [{"role": "user", "content": "there"}, {"role": role, "content": content}]
        assert found.write(messages) == found.expected(messages)


def test_parts_in_other_words(speaker: Any) -> None:
    found = speaker(PARTS["loop"])
    messages = [
        {
            "role": "assistant",
            "content": [
                {"type": "refusal", "refusal": "no"},
                "and",
                {"type": "output_text", "text": "more", "annotations": []},
                {"type": "text", "text": "words", "cache_control": {"type": "ephemeral"}},
            ],
        }
    ]
    assert found.write(messages) == "noandmorewords"
    assert speaker(PLAIN).write(messages) == "[assistant] no\nand\nmore\nwords"


def test_others_get_one_text(speaker: Any) -> None:
    for template in (
        PLAIN,
        PLAIN.replace("m.content", "m.content | trim"),
        PLAIN.replace("m.content", "m['content'] + ''"),
    ):
        assert speaker(template).write([{"role": "user", "content": TWO}]) == "[user] the \npeople"
    tojson = PLAIN.replace("m.content", "m.content | tojson")
    assert speaker(tojson).write([{"role": "user", "content": TWO}]) == '[user] "the \\npeople"'


def test_text_for_templates_that_read_parts_alone(speaker: Any) -> None:
    found = speaker(ONLY_PARTS)
    assert found.write([{"role": "user", "content": "the people"}]) == "the people"
    assert found.write([{"role": "user", "content": TWO}]) == "the people"


def test_roles_may_differ(speaker: Any) -> None:
    """Some templates read parts of users' turns and take a system's for text."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}{% elif m.content "
        "is string %}"
        "{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% "
        "endfor %}"
    )
    messages = [{"role": "system", "content": TWO}, {"role": "user", "content": TWO}]
    assert speaker(template).write(messages) == "the \npeoplethe people"


NONE = (
    "{% for m in messages %}{% if m.content is none %}NONE{% elif m.content is not defined "
    "%}ABSENT{% else %}"
    "{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
    "{% if c.function.arguments is mapping %}MAP{% endif %}{% endfor %}{% endfor %}"
)


def _turn(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **fields}


@pytest.mark.parametrize(
    "sent, read",
    [
        ('{"x": [1, {"y": null}]}', {"x": [1, {"y": None}]}),
        ("{}", {}),
        ("", {}),
        ({"x": 1}, {"x": 1}),
        ("no JSON {", "no JSON {"),
        ("[" * 100_000, "[" * 100_000),
        (None, None),
    ],
)
def test_arguments_of_calls_are_data(speaker: Any, sent: Any, read: Any) -> None:
    found = speaker(NONE)
    user = {"role": "user", "content": "the"}
    for fields in ({"content": None}, {}, {"content": "words"}):
        messages = [
            user,
            _turn(sent, **fields),
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ]
        want = [user, _turn(read, **fields), messages[2]]
        assert found.write(messages) == found.expected(want)


def test_odd_calls_are_handed_on(speaker: Any) -> None:
    found = speaker("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    for extra in (
        {"tool_calls": None},
        {"tool_calls": ["x", {"function": 3}]},
        {"function_call": {"name": "f"}},
        {"name": "n"},
    ):
        messages = [{"role": "assistant", "content": None, **extra}]
        assert found.write(messages) == found.expected(messages)


def test_variables_that_templates_read() -> None:
    template = (
        "{% macro w(x) %}{{ x }}{{ mood }}{% endmacro %}{%- for m in messages -%}{%- if loop.first "
        "%}{% continue %}"
        "{% endif %}{% generation %}{{ w(m.content) }}{%- endgeneration -%}{% set own = 1 %}{{ own "
        "}}{% endfor %}"
    )
    assert variables(template) == {"messages", "mood"}
    assert variables("{% if %}") == frozenset()


def test_templates_that_refuse(speaker: Any) -> None:
    found = speaker(
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('roles alternate') "
        "}}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(RequestError, match="roles alternate"):
        found.write([{"role": "assistant", "content": "x"}])
    with pytest.raises(ApiError, match="reads no 'mood'"):
        found.write([{"role": "user", "content": "x"}], chat_template_kwargs={"mood": "x"})
