"""Qwen3-Coder's: a function and its parameters in tags, values as they are.

    <tool_call>
    <function=weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

A value has the type that the tool's schema says; a string is not quoted. Source: the chat template
of Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from scripts.server.tools.parser import Call, ToolParser

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*\Z", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


class Qwen3CoderParser(ToolParser):
    begin, end = "<tool_call>", "</tool_call>"

    def calls_of(self, block: str) -> list[Call] | None:
        function = _FUNCTION.match(block)
        if function is None:
            return None
        name, inside = function[1].strip(), function[2]
        schema = self.tools.get(name, {}).get("parameters") or {}
        properties = schema.get("properties") or {}
        arguments: dict[str, Any] = {}
        at = 0
        while found := _PARAMETER.match(inside, at):
            key = found[1].strip()
            arguments[key] = _value(found[2], properties.get(key) or {})
            at = found.end()
        if inside[at:].strip():
            return None
        return [Call(name, json.dumps(arguments, ensure_ascii=False))]


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """What a parameter's text stands for. One line break on each side belongs to the tags."""
    text = text.removeprefix("\n").removesuffix("\n")
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds or ())
    if not kinds or kinds == ["string"]:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
    return text if "string" in kinds and not isinstance(value, str | None) else value
