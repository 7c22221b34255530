"""What parsers of calls have in common: an answer's text comes in pieces, and what is certain of it
goes out, as content or as whole calls."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Call:
    """arguments: JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """What became certain: content that goes to the reader, and calls."""

    content: str = ""
    calls: tuple[Call, ...] = ()


class ToolParser(ABC):
    """Of one answer. What stands between `begin` and `end` is calls, all else is content.

    A block that is no call is content, marks included, so that nothing of an answer is lost.
    """

    begin: ClassVar[str]
    end: ClassVar[str | None]
    """None: a block goes to the end of the answer."""

    special: ClassVar[bool] = False
    """Whether marks are special tokens, which the text must then keep."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        """tools: as the request has them."""
        self.tools = {t["function"]["name"]: t["function"] for t in tools}
        self._held = ""
        self._inside = self._called = False

    @abstractmethod
    def calls_of(self, block: str) -> list[Call] | None:
        """Of the text between the marks; None if it is no call."""

    def push(self, text: str) -> Parsed:
        """More of the answer."""
        self._held += text
        content: list[str] = []
        calls: list[Call] = []
        while True:
            if not self._inside:
                at = self._held.find(self.begin)
                certain = len(self._held) - overlap(self._held, self.begin) if at < 0 else at
                content.append(self._outside(self._held[:certain]))
                if at < 0:
                    self._held = self._held[certain:]
                    break
                self._held, self._inside = self._held[at + len(self.begin) :], True
            at = -1 if self.end is None else self._held.find(self.end)
            if self.end is None or at < 0:
                break
            found = self._closed(self._held[:at])
            content.append(found.content)
            calls += found.calls
            self._held, self._inside = self._held[at + len(self.end) :], False
        return Parsed("".join(content), tuple(calls))

    def finish(self) -> Parsed:
        """The answer is over: what was held back."""
        held, self._held = self._held, ""
        if not self._inside:
            return Parsed(self._outside(held))
        self._inside = False
        if self.end is None:
            return self._closed(held)
        return Parsed(self.begin + held)  # a block that was cut is no call

    def _closed(self, block: str) -> Parsed:
        calls = self.calls_of(block)
        if calls is None:
            return Parsed(self.begin + block + (self.end or ""))
        self._called = True
        return Parsed("", tuple(calls))

    def _outside(self, text: str) -> str:
        """Content; blanks between calls and behind them are none."""
        return "" if self._called and not text.strip() else text


def overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0


def call_of(value: Any) -> Call | None:
    """Of `{"name": ..., "arguments": ...}` as data; None if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
