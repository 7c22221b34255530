"""One answer in which tools may be called: its text becomes content and calls as it comes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from scripts.server.tools import new_parser
from scripts.server.tools.parser import Call, Parsed, call_of
from scripts.server.tools.requested_tools import NamedTool, Tool, ToolChoice


class CalledFunction(BaseModel):
    name: str | None = None
    arguments: str


class ToolCall(BaseModel):
    """Of whole answers, and of pieces of streams, where `index` counts an answer's calls."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Calling:
    """What becomes of one answer's text."""

    def __init__(
        self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool, parser: str | None
    ):
        """parser: of calls that a model makes by itself."""
        self._choice, self._parallel = choice, parallel
        self._parser = None
        if choice == "auto" and parser is not None:
            self._parser = new_parser(parser, [tool.plain() for tool in tools])
        self._held = ""
        self.count = 0

    @property
    def finish_reason(self) -> str | None:
        """In place of `stop`; None: `stop` it is, as with OpenAI where one tool was named."""
        made = self.count > 0 and not isinstance(self._choice, NamedTool)
        return "tool_calls" if made else None

    def push(self, text: str, over: bool) -> tuple[str, list[ToolCall]]:
        """More text, the last if the answer is over: content, and what is new of calls."""
        if isinstance(self._choice, NamedTool):
            return "", self._named(self._choice.function.name, text)
        if self._parser is None:
            self._held += text
            calls = _listed(self._held) if over else ()
            content = self._held if over and not calls else ""
            return content, self._calls(calls)
        found = [self._parser.push(text)]
        if over:
            found.append(self._parser.finish())
        return "".join(f.content for f in found), self._calls(_all(found))

    def _named(self, name: str, text: str) -> list[ToolCall]:
        """The text is the arguments, as they come."""
        self.count += 1
        if self.count > 1:
            return [ToolCall(index=0, function=CalledFunction(arguments=text))] if text else []
        function = CalledFunction(name=name, arguments=text)
        return [ToolCall(index=0, id=_new_id(), type="function", function=function)]

    def _calls(self, calls: Sequence[Call]) -> list[ToolCall]:
        found = []
        for call in calls if self._parallel else calls[: 1 - min(1, self.count)]:
            function = CalledFunction(name=call.name, arguments=call.arguments)
            found.append(
                ToolCall(index=self.count, id=_new_id(), type="function", function=function)
            )
            self.count += 1
        return found


def _all(found: Sequence[Parsed]) -> list[Call]:
    return [call for one in found for call in one.calls]


def _listed(text: str) -> list[Call]:
    """The calls of an answer that had to be a list of them; none if it was cut."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    return [call for value in values if (call := call_of(value)) is not None]


def _new_id() -> str:
    """Nine letters and digits, which Mistral's templates ask for."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return "".join(secrets.choice(alphabet) for _ in range(9))
