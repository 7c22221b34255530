"""Sampling against transformers' logits processors, and its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from common import RequestError, SamplingParams
from common.sampling import sample


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution that transformers draws from."""
    scores = torch.from_numpy(logits)[None].clone()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.01},
    ],
    ids=str,
)
def test_draws_follow_transformers_distribution(options: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(0, 2, size=40).astype(np.float32)
    params = SamplingParams(**options)
    expected = reference(logits, params)
    rng = np.random.default_rng(1)
    draws = np.bincount([sample(logits, params, rng) for _ in range(20_000)], minlength=40) / 20_000
    assert set(np.flatnonzero(draws)) <= set(np.flatnonzero(expected))
    # Five standard deviations of a share of 20,000 draws.
    assert (np.abs(draws - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9).all()


class Sweep:
    """Stands in for a generator: gives the middle of each of `count` equal parts of 0..1 in turn."""

    def __init__(self, count: int):
        self._values = iter((np.arange(count) + 0.5) / count)

    def random(self) -> float:
        return float(next(self._values))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 50),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    ties=st.booleans(),
)
def test_every_share_is_transformers(seed: int, temperature: float, top_k: int, top_p: float, ties: bool) -> None:
    """Draws spread evenly over 0..1 give each token its probability's share of them, exactly but for the rounding."""
    logits = np.random.default_rng(seed).normal(0, 2, size=30).astype(np.float32)
    if ties:
        logits = logits.round()
        top_p = 1.0  # which of equal scores is dropped at the edge is a matter of sorting
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    count = 2000
    sweep = Sweep(count)
    draws = np.bincount([sample(logits, params, sweep) for _ in range(count)], minlength=30)  # type: ignore[arg-type]
    expected = reference(logits, params) * count
    assert (np.abs(draws - expected) <= 1.01).all(), (draws, expected)
    assert not draws[expected == 0].any()


def test_greedy_takes_the_most_probable() -> None:
    logits = np.array([0.0, 3.0, 3.0, -np.inf], dtype=np.float32)
    rng = np.random.default_rng(0)
    assert sample(logits, SamplingParams(), rng) == 1
    assert sample(logits, SamplingParams(temperature=2.0, top_k=1), rng) == 1


def test_padding_of_a_narrower_vocabulary_is_never_drawn() -> None:
    logits = np.array([0.0, 0.0, -np.inf, -np.inf], dtype=np.float32)
    params = SamplingParams(temperature=100.0, top_p=0.999)
    rng = np.random.default_rng(0)
    assert {sample(logits, params, rng) for _ in range(300)} == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a whole number from 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"temperature": -0.1}, "temperature is -0.1; give a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0}, "top_p is 0; give a number above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"stop": 5}, "stop is 5; give a list"),
        ({"temperature": "hot"}, "temperature is 'hot'; give a number from 0"),
        ({"temperature": None}, "temperature is None"),
        ({"top_p": None}, "top_p is None; give a number above 0"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; give a list"),
        ({"stop_token_ids": ["a"]}, r"stop_token_ids is \('a',\); give whole numbers"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_stop_may_be_one_string() -> None:
    assert SamplingParams(stop="abc").stop_strings == ("abc",)


def test_no_stop_may_be_none() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
