"""Sampling against transformers' logits processors, and its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import RequestError, SamplingParams
from common.serving.sampling import Choice, adjusted, log_probabilities, sample
from tests.helpers import examples


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


@pytest.mark.slow
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
    numbers = rng.random(20_000).tolist()
    drawn = [sample(logits, Choice(params, uniform=number)) for number in numbers]
    draws = np.bincount(drawn, minlength=40) / 20_000
    assert set(np.flatnonzero(draws)) <= set(np.flatnonzero(expected))
    # Five standard deviations of a share of 20,000 draws.
    assert (
        np.abs(draws - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9
    ).all()


@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 50),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    ties=st.booleans(),
)
def test_every_share_is_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, ties: bool
) -> None:
    """Draws spread evenly over 0..1 give each token its probability's share of them, exactly but
    for the rounding."""
    logits = np.random.default_rng(seed).normal(0, 2, size=30).astype(np.float32)
    if ties:
        logits = logits.round()
        top_p = 1.0  # which of equal scores is dropped at the edge is a matter of sorting
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    count = 2000
    middles = ((np.arange(count) + 0.5) / count).tolist()
    drawn = [sample(logits, Choice(params, uniform=middle)) for middle in middles]
    draws = np.bincount(drawn, minlength=30)
    expected = reference(logits, params) * count
    assert (np.abs(draws - expected) <= 1.01).all(), (draws, expected)
    assert not draws[expected == 0].any()


def test_greedy_takes_the_most_probable() -> None:
    logits = np.array([0.0, 3.0, 3.0, -np.inf], dtype=np.float32)
    assert sample(logits, Choice(SamplingParams())) == 1
    assert sample(logits, Choice(SamplingParams(temperature=2.0, top_k=1))) == 1


def test_padding_of_a_narrower_vocabulary_is_never_drawn() -> None:
    logits = np.array([0.0, 0.0, -np.inf, -np.inf], dtype=np.float32)
    params = SamplingParams(temperature=100.0, top_p=0.999)
    numbers = np.random.default_rng(0).random(300).tolist()
    assert {sample(logits, Choice(params, uniform=number)) for number in numbers} == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a whole number from 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True; give a whole number from 1"),
        ({"temperature": True}, "temperature is True; give a number from 0"),
        ({"top_k": True}, "top_k is True; give a whole number"),
        ({"top_p": True}, "top_p is True; give a number above 0"),
        ({"seed": False}, "seed is False; give a whole number from 0"),
        ({"stop_token_ids": [True]}, r"stop_token_ids is \(True,\); give whole numbers"),
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
        ({"min_p": 1.5}, r"min_p is 1\.5; give a number from 0 to 1"),
        ({"min_tokens": -1}, "min_tokens is -1; give a whole number from 0"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens is 9 and max_new_tokens 8"),
        ({"presence_penalty": 3}, "presence_penalty is 3; give a number from -2 to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty is 'x'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; give a number above 0"),
        ({"logprobs": 21}, "logprobs is 21; give a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; give token ids with a number for each"),
        ({"logit_bias": {"x": 1}}, "logit_bias is .*; give token ids"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias is .*; give finite numbers"),
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


def test_log_probabilities_are_torchs() -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 5
    expected = torch.log_softmax(torch.from_numpy(logits), dim=-1)
    found = log_probabilities(logits, 7, 5)
    assert found.token_id == 7 and found.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = expected.topk(5)
    assert [i for i, _ in found.top] == best.indices.tolist()
    np.testing.assert_allclose([p for _, p in found.top], best.values, atol=1e-5)
    assert log_probabilities(logits, 7, 0).top == ()


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    logits = np.random.default_rng(1).normal(size=30).astype(np.float32)
    prompt, answer = [3, 4, 4], [5, 3]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + answer]), torch.from_numpy(logits.copy())[None]
    )[0]
    params = SamplingParams(repetition_penalty=penalty)
    found = adjusted(logits, Choice(params, prompt, answer))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = adjusted(np.zeros(6, dtype=np.float32), Choice(params, [5, 5], [1, 2, 1]))
    np.testing.assert_array_equal(found, [0, -1.0, -0.75, 0, 0, 0])


def test_min_p_is_transformers() -> None:
    logits = np.random.default_rng(2).normal(size=40).astype(np.float32) * 2
    kept = MinPLogitsWarper(0.2)(torch.zeros(1, 1), torch.from_numpy(logits / 1.5)[None])[0]
    expected = set(torch.isfinite(kept).nonzero().flatten().tolist())
    params = SamplingParams(temperature=1.5, min_p=0.2)
    numbers = np.random.default_rng(0).random(5000).tolist()
    assert {sample(logits, Choice(params, uniform=number)) for number in numbers} == expected


def test_biases_and_banned_tokens() -> None:
    logits = np.array([1.0, 5.0, 2.0], dtype=np.float32)
    biased = SamplingParams(logit_bias={2: 100})
    assert sample(logits, Choice(biased)) == 2
    assert sample(logits, Choice(SamplingParams(), banned={1})) == 2
    assert sample(logits, Choice(SamplingParams(temperature=1.0), banned={1, 2})) == 0
    assert sample(logits, Choice(biased, forced=0)) == 0
    np.testing.assert_array_equal(logits, [1.0, 5.0, 2.0])  # the caller's are not changed


def test_what_needs_all_logits() -> None:
    assert not SamplingParams(top_p=0.5, seed=3, min_p=0.1).needs_logits
    for options in (
        {"temperature": 1.0},
        {"min_tokens": 1},
        {"logprobs": 0},
        {"logit_bias": {1: 1.0}},
    ):
        assert SamplingParams(**options).needs_logits, options  # type: ignore[arg-type]
