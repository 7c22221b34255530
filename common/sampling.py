"""Sampling options and the choice of the next token, in numpy, the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names and meanings are those of vLLM and Hugging Face.

    max_new_tokens: upper bound of new tokens; the context length bounds it too.
    temperature: 0 is greedy; above 0 the logits are divided by it and a token is drawn.
    top_k: draw among the k most probable tokens; 0 or -1: all.
    top_p: draw among the most probable tokens whose probabilities sum to at least top_p; 1: all.
    seed: makes the draws of this request repeatable; None draws differently each time.
    stop: strings that end the answer (None: none); they are not part of its text.
    stop_token_ids: token ids that end the answer, beside the end-of-sequence ids of the tenant's generation config.
    ignore_eos: go on after an end-of-sequence token.

    Raises RequestError for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = field(default_factory=tuple)
    stop_token_ids: Sequence[int] | None = field(default_factory=tuple)
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens!r}; give a whole number from 1")
        if not isinstance(self.temperature, int | float | np.floating) or not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature!r}; give a number from 0 (greedy)")
        if not isinstance(self.top_k, int) or self.top_k < -1:
            raise RequestError(f"top_k is {self.top_k!r}; give a whole number from 1, or 0 for all")
        if not isinstance(self.top_p, int | float | np.floating) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p!r}; give a number above 0 and at most 1")
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise RequestError(f"seed is {self.seed!r}; give a whole number from 0, or None")
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError("stop holds an empty string or no string; give non-empty strings")
        if any(not isinstance(i, int | np.integer) for i in self.stop_token_ids or ()):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}; give whole numbers")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """A list option as a tuple; None is none."""
    try:
        return () if value is None else tuple(value)
    except TypeError as error:
        raise RequestError(f"{name} is {value!r}; give a list") from error


def sample(logits: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token id. logits: float32 [vocab]; entries of -inf are never chosen.

    Order as in transformers' LogitsProcessorList for sampling: temperature, top-k, top-p, then the draw.
    """
    if params.greedy:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / params.temperature
    ids = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        # Keep ties with the k-th score, as a threshold on the value does.
        threshold = np.partition(scores, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scores >= threshold)
        scores = scores[ids]
    scores = scores - scores.max()
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        keep = order[before < params.top_p]
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    return int(
        ids[
            np.searchsorted(np.cumsum(probabilities), rng.random() * probabilities.sum(), side="right").clip(
                0, len(ids) - 1
            )
        ]
    )
