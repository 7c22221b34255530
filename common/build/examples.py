"""Examples of a tenant's use, which calibration runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import RequestError

if TYPE_CHECKING:
    pass

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Example:
    """A prompt and, if it is known, its answer. A text to be continued by nothing has an empty
    answer."""

    prompt: Prompt
    answer: Prompt | None = None


def json_fault(error: ValueError) -> str:
    """What is wrong with a line of JSON, without the number of the only line that the parser
    saw."""
    return (
        f"{error.msg} at character {error.pos + 1}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )


def refused_pair(value: Mapping[str, Any]) -> str | None:
    """What is wrong with a JSONL line that has two fields of which one would be ignored; None if
    nothing is."""
    if "text" in value and "prompt" in value:
        return "has both prompt and text; keep prompt (with answer) or text, or write two lines"
    if "text" in value and "answer" in value:
        return "has both text and answer; write prompt and answer, or text alone"
    return None


@dataclass(frozen=True)
class CalibrationSet:
    """Examples of one tenant's use. Where an answer is None, the tenant's own greedy one is taken.

    Attributes:
        max_new_tokens: longest answer that is generated.
    """

    examples: tuple[Example, ...]
    max_new_tokens: int = 64

    @classmethod
    def of(cls, prompts: Iterable[Prompt], max_new_tokens: int = 64) -> CalibrationSet:
        """Prompts to be answered by the tenant itself."""
        return cls(tuple(Example(p) for p in prompts), max_new_tokens)

    @classmethod
    def texts(cls, texts: Iterable[Prompt]) -> CalibrationSet:
        """Texts as they are, nothing generated."""
        return cls(tuple(Example(t, "" if isinstance(t, str) else ()) for t in texts))

    @classmethod
    def read(cls, path: str | Path, max_new_tokens: int = 64) -> CalibrationSet:
        """A JSONL file: lines of {"prompt": ..., "answer": ...}, {"prompt": ...} or {"text": ...}.

        Raises RequestError that names the file and the line.
        """
        path = Path(path)
        examples = []
        try:
            # Not splitlines(): a JSON string may hold characters that it takes for the end of a
            # line.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise RequestError(
                    f"{path}, line {number}: not JSON ({json_fault(error)}); write one object a "
                    "line"
                ) from error
            if not isinstance(value, dict) or not ({"prompt", "text"} & set(value)):
                raise RequestError(
                    f'{path}, line {number}: expected {{"prompt": ...}}, '
                    '{"prompt": ..., "answer": ...} or '
                    '{"text": ...}'
                )
            pair = refused_pair(value)
            if pair is not None:
                raise RequestError(f"{path}, line {number}: {pair}")
            prompt = value.get("prompt", value.get("text"))
            answer = value.get("answer", None if "prompt" in value else "")
            if (
                not isinstance(prompt, str)
                or not prompt
                or not (answer is None or isinstance(answer, str))
            ):
                raise RequestError(
                    f"{path}, line {number}: prompt, answer and text are strings, and not empty"
                )
            examples.append(Example(prompt, answer))
        if not examples:
            raise RequestError(f"{path}: holds no example; give at least one line")
        return cls(tuple(examples), max_new_tokens)
