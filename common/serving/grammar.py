"""Which tokens may come next in an answer that has a structure, by llguidance.

A tenant's grammars are compiled for its own tokenizer, once each, and a request has a copy of one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import RequestError
from common.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    import llguidance

# Compiled grammars that are kept for a tenant, least recently used first out.
MOST_KEPT = 64


@cache
def _thread() -> ThreadPoolExecutor:
    """What may come next is computed here while a step computes the logits."""
    return ThreadPoolExecutor(1, thread_name_prefix="grammar")


class Grammar:
    """What may come next in one answer."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size
        self._coming: Future[np.ndarray] | None = None
        self._behind: int | None = None

    def begin_behind(self, token_id: int) -> None:
        """Let what comes before this token, and the token, be free."""
        self._behind = token_id

    def prepare(self) -> None:
        """Begin to compute, in a thread of its own, what may come next."""
        if self._behind is None:
            self._coming = _thread().submit(self._mask)

    def allowed(self) -> np.ndarray | None:
        """bool [vocab]: tokens that may come next, when they are known; None where all may, and
        where the library has given up, which `take` then raises."""
        if self._behind is not None:
            return None
        assert self._coming is not None, "not prepared"
        return self._coming.result() if self._coming.exception() is None else None

    def _mask(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if not found.any():
            raise self._stuck()
        return np.pad(found, (0, self._vocab_size - len(found)))

    def take(self, token_id: int) -> None:
        """The token that came. Raises RequestError where the library gives up on the grammar."""
        if self._behind is not None:
            if token_id == self._behind:
                self._behind = None
            return
        if self._coming is not None and (error := self._coming.exception()) is not None:
            raise error
        if not self._matcher.consume_token(token_id):
            raise self._stuck()

    def _stuck(self) -> RequestError:
        why = " ".join(self._matcher.get_error().split())[:300] or "no token may come next"
        return RequestError(f"structured_outputs: the grammar cannot go on ({why}); simplify it")

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may come."""
        return self._behind is None and bool(self._matcher.is_stopped())


class Grammars:
    """Of one tenant. Threads may ask at once."""

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int]):
        """tokenizer: of transformers, a fast one. vocab_size: of the model. ends: ids of which one
        ends an answer.

        Raises RequestError where llguidance is not installed, or cannot read the tokenizer.
        """
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise RequestError(
                "structured_outputs: llguidance is not installed; run: pip install "
                "'moetel[structured]'"
            ) from error
        self._library, self._vocab_size = llguidance, vocab_size
        try:
            size = max(vocab_size, len(tokenizer))
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, size, list(ends) or None)
        except Exception as error:  # the library raises several kinds
            raise RequestError(
                f"structured_outputs: this tenant's tokenizer cannot be used ({error}); it has to "
                "be a fast one, as tokenizer.json has"
            ) from error
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, wanted: StructuredOutputs) -> Grammar:
        """At the beginning of an answer. Raises RequestError for what the library cannot do."""
        try:
            text = self._text(wanted)
        except ValueError as error:
            raise RequestError(f"structured_outputs.{wanted.kind}: {error}") from error
        with self._lock:
            found = self._kept.get(text)
            if found is not None:
                self._kept.move_to_end(text)
        if found is None:
            found = self._library.LLMatcher(self._tokenizer, text, log_level=0)
            if found.is_error():
                why = " ".join(found.get_error().split())[:300]
                raise RequestError(f"structured_outputs.{wanted.kind} cannot be used: {why}")
            with self._lock:
                self._kept[text] = found
                while len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
        return Grammar(found.deep_copy(), self._vocab_size)

    def _text(self, wanted: StructuredOutputs) -> str:
        """The grammar as the library reads it."""
        if wanted.json is not None or wanted.json_object:
            schema = wanted.json if wanted.json is not None else '{"type": "object"}'
            options = {"whitespace_flexible": not wanted.disable_any_whitespace}
            matcher = self._library.LLMatcher
            return str(matcher.grammar_from_json_schema(schema, options))  # type: ignore[arg-type]
        if wanted.choice is not None:
            return self._library.grammar_from("choice", json.dumps(list(wanted.choice)))
        if wanted.regex is not None:
            return self._library.grammar_from("regex", wanted.regex)
        assert wanted.grammar is not None
        return self._library.grammar_from("grammar", wanted.grammar)
