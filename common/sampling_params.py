"""What a request asks for: how tokens are chosen and when an answer ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import RequestError
from common.units import is_whole

MAX_LOGPROBS = 20  # OpenAI's and vLLM's bound


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names and meanings are those of vLLM and Hugging Face.

    max_new_tokens: upper bound of new tokens; the context length bounds it too.
    temperature: 0 is greedy; above 0 the logits are divided by it and a token is drawn.
    top_k: draw among the k most probable tokens; 0 or -1: all.
    top_p: draw among the most probable tokens whose probabilities sum to at least top_p; 1: all.
    seed: makes the draws of this request repeatable; None draws differently each time.
    stop: strings that end the answer (None: none); they are not part of its text.
    stop_token_ids: token ids that end the answer, beside the end-of-sequence ids of the tenant's
        generation config.
    ignore_eos: go on after an end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text. A stop string that is one of them
        ends the answer still.
    include_stop_str_in_output: keep the stop string, or stop token, that ends the answer in its
        text.
    min_p: draw among the tokens that are at least min_p times as probable as the most probable one;
        0: all.
    min_tokens: no token ends the answer before it has so many; a stop string still does.
    presence_penalty, frequency_penalty: taken from the logits of tokens that the answer holds,
        once, and as often as it holds them (OpenAI's). repetition_penalty: positive logits of
        tokens in prompt and answer are divided by it, negative ones multiplied (arXiv 1909.05858);
        1: none.
    logit_bias: token id -> what is added to its logit.
    logprobs: give each token's log probability, and those of so many most probable ones; None:
        none. They are the model's own, before anything above changes them, as in vLLM.

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
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        if not is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens is {self.max_new_tokens!r}; give a whole number from 1"
            )
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise RequestError(
                f"temperature is {self.temperature!r}; give a number from 0 (greedy)"
            )
        if not is_whole(self.top_k) or self.top_k < -1:
            raise RequestError(f"top_k is {self.top_k!r}; give a whole number from 1, or 0 for all")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p!r}; give a number above 0 and at most 1")
        if self.seed is not None and (not is_whole(self.seed) or self.seed < 0):
            raise RequestError(f"seed is {self.seed!r}; give a whole number from 0, or None")
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError("stop holds an empty string or no string; give non-empty strings")
        if any(not (is_whole(i) or isinstance(i, np.integer)) for i in self.stop_token_ids or ()):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}; give whole numbers")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p is {self.min_p!r}; give a number from 0 to 1")
        if not is_whole(self.min_tokens) or self.min_tokens < 0:
            raise RequestError(f"min_tokens is {self.min_tokens!r}; give a whole number from 0")
        if self.min_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} and max_new_tokens {self.max_new_tokens}; give "
                "at most as many"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not -2 <= value <= 2:
                raise RequestError(f"{name} is {value!r}; give a number from -2 to 2")
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < float(
            "inf"
        ):
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty!r}; give a number above 0"
            )
        if self.logprobs is not None and (
            not is_whole(self.logprobs) or not 0 <= self.logprobs <= MAX_LOGPROBS
        ):
            raise RequestError(
                f"logprobs is {self.logprobs!r}; give a whole number from 0 to {MAX_LOGPROBS}, or "
                "None"
            )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give True or False")
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def needs_logits(self) -> bool:
        """Whether more than the most probable token has to be known."""
        return (
            not self.greedy
            or self.min_tokens > 0
            or self.changes_logits
            or self.logprobs is not None
        )

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases apply."""
        penalties = (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
        return penalties or bool(self.logit_bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """A list option as a tuple; None is none."""
    try:
        return () if value is None else tuple(value)
    except TypeError as error:
        raise RequestError(f"{name} is {value!r}; give a list") from error


def _bias(value: Any) -> dict[int, float] | None:
    """logit_bias with whole keys (OpenAI's come as strings) and finite numbers."""
    if not value:
        return None
    try:
        found = {int(k): float(v) for k, v in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(
            f"logit_bias is {value!r}; give token ids with a number for each"
        ) from error
    if not all(math.isfinite(v) for v in found.values()):
        raise RequestError(f"logit_bias is {value!r}; give finite numbers")
    return found
