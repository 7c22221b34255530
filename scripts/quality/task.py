"""What a tenant is judged by, and how to measure it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import MoetelError, UnknownTenantError
from common.build.examples import json_fault, refused_pair
from common.serving.checks import Prompt

Metric = Literal["auto", "exact_match", "rouge1", "rougeL", "perplexity"]
METRICS = ("auto", "exact_match", "rouge1", "rougeL", "perplexity")


class TaskError(MoetelError):
    """A task file that cannot be used, or a method that cannot be applied."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that counts as right if there is one: text or token ids."""

    prompt: Prompt
    answer: Prompt | None = None


@dataclass(frozen=True)
class Task:
    """What a tenant is judged by. source: where it comes from, for errors."""

    questions: tuple[Question, ...] = ()
    texts: tuple[Prompt, ...] = ()
    source: str = "task"

    @classmethod
    def read(cls, path: str | Path, limit: int | None = None) -> Task:
        """A JSONL file; `limit` lines of each kind at most. Raises TaskError that names file and
        line."""
        path = Path(path)
        try:
            # Not splitlines(): a JSON string may hold characters that it takes for the end of a
            # line.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{path}: cannot be read: {error}") from error
        questions: list[Question] = []
        texts: list[Prompt] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise TaskError(
                    f"{where}: not JSON ({json_fault(error)}); write one object a line"
                ) from error
            if not isinstance(value, dict) or not ({"prompt", "text"} & set(value)):
                raise TaskError(
                    f'{where}: expected {{"prompt": ..., "answer": ...}} or {{"text": ...}}, found '
                    f"{line[:60]!r}"
                )
            pair = refused_pair(value)
            if pair is not None:
                raise TaskError(f"{where}: {pair}")
            if "text" in value:
                texts.append(_words(value["text"], f"{where}: text"))
            else:
                answer = value.get("answer")
                questions.append(
                    Question(
                        _words(value["prompt"], f"{where}: prompt"),
                        None if answer is None else _words(answer, f"{where}: answer"),
                    )
                )
        if not questions and not texts:
            raise TaskError(f"{path}: no line in it; write at least one prompt or text")
        return cls(tuple(questions[:limit]), tuple(texts[:limit]), str(path))


def _words(value: Any, what: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(i) is int for i in value):
        return tuple(value)
    raise TaskError(
        f"{what} is {str(value)[:60]!r}; write a text that is not empty, or a list of token ids"
    )


def check_tasks(tasks: Mapping[str, Task], tenants: tuple[str, ...]) -> None:
    for name in tasks:
        if name not in tenants:
            raise UnknownTenantError(name, tenants)
    if not tasks:
        raise TaskError(
            "no task: give each tenant that is to be judged one, as --task NAME=FILE.jsonl"
        )


@dataclass(frozen=True)
class Options:
    """How to measure.

    window, stride: perplexity feeds at most `window` tokens at once and scores `stride` new ones
        with each (all but the first `window`, which are scored whole); every token but a text's
        first is scored once. None: the smaller of 512 and the tenant's context; stride: the window.
    max_new_tokens: longest answer. forced: which answer the distributions are compared along: the
        tenant's own greedy one when it stands alone, or the given one.
    positions: most positions of a tenant that distributions are compared at, evenly spread; the
        tenant's own logits at these are kept on disk, 4 bytes * vocabulary each.
    logits_bytes: most bytes of logits in memory at once, one row of tokens at least.
    metric: what "kept" compares; auto: exact match, if the tenant alone has any, else ROUGE-1, else
        perplexity.
    scratch: folder for stores and logits, emptied again; None: the system's.
    """

    window: int | None = None
    stride: int | None = None
    max_new_tokens: int = 128
    forced: Literal["own", "given"] = "own"
    positions: int = 4096
    logits_bytes: int = 1 << 28
    metric: Metric = "auto"
    device: str = "auto"
    dtype: str = "auto"
    scratch: Path | None = None

    def __post_init__(self) -> None:
        for name in ("window", "stride", "max_new_tokens", "positions"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise TaskError(f"{name} is {value!r}; give a whole number from 1")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise TaskError(
                f"stride {self.stride} is longer than window {self.window}: tokens would be left "
                "out"
            )


DEFAULTS = Options()
