"""What an answer has to be: JSON, a pattern, one of some texts, or what a grammar says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import RequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputs:
    """Exactly one of the first five. Names and meanings are those of vLLM.

    Attributes:
        json: a JSON schema, as a mapping or as its text.
        regex: a regular expression that the whole answer matches.
        choice: texts of which the answer is one.
        grammar: in Lark's or GBNF's notation.
        json_object: any JSON object.
        behind: a token behind which the structure begins, such as the end of a model's reasoning.
            What stands before it is free. None: the answer begins with the structure.
        disable_any_whitespace: no blanks between JSON's tokens but one behind colons and commas.

    Raises:
        RequestError: none or several are given, or one is malformed.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    behind: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "is empty"
            raise RequestError(f"structured_outputs {what}; give exactly one of {', '.join(KINDS)}")
        for kind in ("regex", "grammar"):
            value = getattr(self, kind)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"structured_outputs.{kind} is {value!r}; give text")
        if self.choice is not None:
            texts = list(self.choice) if not isinstance(self.choice, str) else []
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise RequestError(
                    f"structured_outputs.choice is {self.choice!r}; give a list of texts"
                )
            object.__setattr__(self, "choice", tuple(texts))
        if self.json is not None:
            object.__setattr__(self, "json", self._schema(self.json))

    @staticmethod
    def _schema(value: Any) -> str:
        """The schema as text."""
        try:
            found = json.loads(value) if isinstance(value, str) else value
            if not isinstance(found, Mapping | bool):
                raise ValueError("it is no object")
            return json.dumps(found)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"structured_outputs.json is no JSON schema: {error}") from error

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))
