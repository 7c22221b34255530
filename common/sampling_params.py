"""What a request asks for: how tokens are chosen and when an answer ends."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.bounds import Bound, bounded, check_bounds
from common.errors import RequestError
from common.structured_outputs import StructuredOutputs
from common.units import is_whole

MAX_LOGPROBS = 20  # OpenAI's and vLLM's bound
LARGEST = sys.float_info.max
FLAG = Bound(choices=(True, False))


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names and meanings are those of vLLM and Hugging Face.

    Attributes:
        max_new_tokens: upper bound of new tokens; the context length bounds it too.
        temperature: 0 is greedy; above 0 the logits are divided by it and a token is drawn.
        top_k: draw among the k most probable tokens; 0 or -1: all.
        top_p: draw among the most probable tokens whose probabilities sum to at least top_p.
        seed: makes the draws of this request repeatable; None draws differently each time.
        stop: strings that end the answer; they are not part of its text.
        stop_token_ids: token ids that end the answer, beside the end-of-sequence ids of the
            tenant's generation config.
        ignore_eos: go on after an end-of-sequence token.
        min_p: draw among the tokens that are at least min_p times as probable as the most probable
            one.
        min_tokens: no token ends the answer before it has so many; a stop string still does.
        presence_penalty: taken once from the logits of tokens that the answer holds (OpenAI's).
        frequency_penalty: taken from them as often as the answer holds them (OpenAI's).
        repetition_penalty: positive logits of tokens in prompt and answer are divided by it,
            negative ones multiplied (arXiv 1909.05858); 1: none.
        logit_bias: token id -> what is added to its logit.
        logprobs: give each token's log probability, and those of so many most probable ones. They
            are the model's own, before anything above changes them, as in vLLM.
        prompt_logprobs: the same for each token of the prompt but the first, which nothing stands
            before. All of the prompt is computed then, whatever the prefix cache holds.
        structured_outputs: what the answer has to be, as JSON of a schema. It ends where nothing
            more may come, and unfinished after `max_new_tokens`. Needs the extra `structured`.
        skip_special_tokens: leave special tokens out of the text. A stop string that is one of them
            ends the answer still.
        include_stop_str_in_output: keep the stop string, or stop token, that ends the answer in its
            text.

    Raises:
        RequestError: a value is out of range.
    """

    max_new_tokens: int = bounded(128, Bound(whole=True, low=1))
    temperature: float = bounded(0.0, Bound(low=0, high=LARGEST, note=" (greedy)"))
    top_k: int = bounded(0, Bound(whole=True, low=-1, note=" (0 or -1: all)"))
    top_p: float = bounded(1.0, Bound(above=0, high=1))
    seed: int | None = bounded(None, Bound(whole=True, low=0, optional=True))
    stop: str | Sequence[str] | None = field(default_factory=tuple)
    stop_token_ids: Sequence[int] | None = field(default_factory=tuple)
    ignore_eos: bool = bounded(False, FLAG)
    min_p: float = bounded(0.0, Bound(low=0, high=1))
    min_tokens: int = bounded(0, Bound(whole=True, low=0))
    presence_penalty: float = bounded(0.0, Bound(low=-2, high=2))
    frequency_penalty: float = bounded(0.0, Bound(low=-2, high=2))
    repetition_penalty: float = bounded(1.0, Bound(above=0, high=LARGEST))
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = bounded(None, Bound(whole=True, low=0, high=MAX_LOGPROBS, optional=True))
    prompt_logprobs: int | None = bounded(
        None, Bound(whole=True, low=0, high=MAX_LOGPROBS, optional=True)
    )
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = bounded(True, FLAG)
    include_stop_str_in_output: bool = bounded(False, FLAG)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        check_bounds(self, RequestError)
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError("stop holds an empty string or no string; give non-empty strings")
        if any(not (is_whole(i) or isinstance(i, np.integer)) for i in self.stop_token_ids or ()):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}; give whole numbers")
        if self.min_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} and max_new_tokens {self.max_new_tokens}; give "
                "at most as many"
            )
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        wanted = self.structured_outputs
        if wanted is not None and not isinstance(wanted, StructuredOutputs):
            raise RequestError(f"structured_outputs is {wanted!r}; give a StructuredOutputs")

    def structured_behind(self, mark: str) -> SamplingParams:
        """The same, with a structure that begins behind a token."""
        wanted = self.structured_outputs
        if wanted is None:
            return self
        return replace(self, structured_outputs=replace(wanted, behind=mark))

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
            or self.structured_outputs is not None
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
