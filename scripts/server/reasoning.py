"""Reasoning in answers: what a model thinks stands before `</think>`, and what it answers behind.

Formats have vLLM's names. In which of them an answer begins is known from the written prompt, whose
template may open the mark itself, or close it where thinking is switched off.
"""

from __future__ import annotations

from typing import Literal

from scripts.server.tools.parser import overlap

BEGIN, END = "<think>", "</think>"


FORMATS = {"deepseek_r1": True, "qwen3": False}
"""Whether an answer is reasoning up to the end mark, though nothing opens it."""


class Reasoning:
    """One answer, whose text becomes reasoning and content as it comes.

    Both keep their blanks, and the marks are in neither. An answer that ends amid its reasoning has
    no content.
    """

    def __init__(self, name: str, prompt: str):
        """name: of `FORMATS`. prompt: as the template wrote it."""
        written = prompt.rstrip()
        self._always = FORMATS[name]
        self._begun = written.endswith(BEGIN)
        self.ended = written.endswith(END)
        self._held = ""

    def push(self, text: str, over: bool) -> tuple[str, str]:
        """More text, the last if the answer is over: what is now certain of reasoning, and of
        content."""
        if self.ended:
            return "", text
        self._held += text
        if not self._begun:
            begins = self._begins_with(over)
            if begins is None:
                return "", ""
            self._begun = True
            if begins == "content":
                self.ended = True
                return "", self._take(len(self._held))
        at = self._held.find(END)
        if at >= 0:
            self.ended = True
            reasoning = self._take(at)
            return reasoning, self._take(len(self._held))[len(END) :]
        return self._take(len(self._held) - (0 if over else overlap(self._held, END))), ""

    def _begins_with(self, over: bool) -> Literal["reasoning", "content"] | None:
        """What the first letters say; None: too few are here. Drops the mark of a beginning."""
        start = self._held.lstrip()
        if not over and any(len(start) < len(m) and m.startswith(start) for m in (BEGIN, END)):
            return None
        if start.startswith(BEGIN):
            self._held = start[len(BEGIN) :]
            return "reasoning"
        # An end may close what nothing opened.
        return "reasoning" if self._always or start.startswith(END) else "content"

    def _take(self, count: int) -> str:
        found, self._held = self._held[:count], self._held[count:]
        return found
