"""The choice of tokens on the device against the one on the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import SamplingParams, StructuredOutputs, build_store, load_engine
from common.serving.sampling import Choice, log_probabilities, sample
from tests.byte_tokenizer import byte_tokenizer
from tests.helpers import examples, random_mixtral, tuned
from torch_engine import sampling

VOCAB = 70

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 9, VOCAB, VOCAB + 5]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.7]),
        "repetition_penalty": st.sampled_from([1.0, 0.6, 1.4]),
        "logit_bias": st.sampled_from([{}, {3: 4.0, VOCAB - 1: -2.0}]),
        "logprobs": st.sampled_from([None, 0, 1, 6]),
    },
)


def choice_of(options: dict[str, Any], seed: int) -> Choice:
    rng = np.random.default_rng(seed)
    prompt = tuple(rng.integers(0, VOCAB, 5).tolist())
    answer = rng.integers(0, VOCAB, int(rng.integers(0, 7))).tolist()
    mask = rng.random(VOCAB) < 0.2
    mask[int(rng.integers(VOCAB))] = True
    return Choice(
        SamplingParams(**options),
        prompt,
        answer,
        banned=[(), {1, 5, VOCAB + 2}, {1}][int(rng.integers(3))],
        forced=[None, None, None, 7][int(rng.integers(4))],
        uniform=float(rng.random()),
        allowed=[None, None, lambda: mask, lambda: None][int(rng.integers(4))],
    )


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(st.lists(OPTIONS, min_size=1, max_size=20), st.integers(0, 10_000), st.booleans())
def test_tokens_and_logprobs_are_the_hosts(rows: list[Any], seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(rows), VOCAB)).astype(np.float32)
    if ties:
        logits = logits.round()
    logits[:, 11] = -np.inf
    choices = [choice_of(options, seed + i) for i, options in enumerate(rows)]
    found = sampling.choose(torch.from_numpy(logits), choices).numpy()
    for row, line, choice in zip(logits, found, choices, strict=True):
        token_id = sample(row, choice)
        assert int(line[0]) == token_id, choice
        logprob = sampling.logprob(line, choice)
        if choice.params.logprobs is None:
            assert logprob is None
            continue
        assert logprob is not None
        expected = log_probabilities(row, token_id, choice.params.logprobs)
        assert logprob.rank == expected.rank and logprob.token_id == token_id
        assert logprob.logprob == pytest.approx(expected.logprob, abs=1e-9)
        values = [value for _, value in expected.top]
        assert [value for _, value in logprob.top] == pytest.approx(values, abs=1e-9)
        if not ties:
            assert [i for i, _ in logprob.top] == [i for i, _ in expected.top]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_logits_of_any_type_are_taken_as_they_are(kind: torch.dtype) -> None:
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0)).to(kind)
    choices = [choice_of({"temperature": 1.0, "top_p": 0.8}, i) for i in range(40)]
    found = sampling.choose(logits, choices)
    expected = [sample(row, c) for row, c in zip(logits.float().numpy(), choices, strict=True)]
    assert found[:, 0].tolist() == expected


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work: Path = tmp_path_factory.mktemp("chooses")
    base = random_mixtral(0, vocab_size=264)
    tenants = {}
    for i, model in enumerate((base, tuned(base, 1))):
        path = tenants[f"t{i}"] = work / f"t{i}"
        model.save_pretrained(path)
        byte_tokenizer([]).save_pretrained(path)
    return build_store(work / "store", tenants).path


def test_an_engine_that_chooses_on_its_device_answers_the_same(store: Path) -> None:
    requests = [("t0", "one"), ("t1", "two"), ("t0", "three"), ("t1", "four"), ("t0", "five")]
    params = [
        SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, top_p=0.9, logprobs=3),
        SamplingParams(max_new_tokens=12),
        SamplingParams(max_new_tokens=12, temperature=0.7, seed=2, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=12, min_tokens=6, logit_bias={40: 3.0}, logprobs=0),
        SamplingParams(
            max_new_tokens=30,
            temperature=1.0,
            seed=3,
            structured_outputs=StructuredOutputs(regex="(ab|c)+d"),
        ),
    ]
    answers = []
    for chooses in (False, True):
        with load_engine(store, device="cpu", dtype="float32") as engine:
            assert engine._backend is not None and engine._backend.chooses is False
            engine._backend.chooses = chooses
            answers.append(engine.generate_batch(requests, params))
    for host, device in zip(*answers, strict=True):
        assert device.token_ids == host.token_ids
        assert [p.rank for p in device.logprobs] == [p.rank for p in host.logprobs]
        for a, b in zip(host.logprobs, device.logprobs, strict=True):
            assert [i for i, _ in a.top] == [i for i, _ in b.top]
            assert b.logprob == pytest.approx(a.logprob, abs=1e-6)
    assert [len(a.logprobs) for a in answers[0]] == [12, 0, 0, 12, 0]


@contextmanager
def host_waits() -> Iterator[list[Any]]:
    """Where the host waits for the device; on a card it is an error at once."""
    emulated = sys.modules.get("fakecuda")
    if emulated is not None:
        found: list[Any] = []
        before = len(emulated.SYNCS)
        yield found
        found += emulated.SYNCS[before:]
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield []
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_chooses_the_same_and_nothing_waits_for_it(store: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (24, VOCAB)).astype(np.float32)
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "top_p": 0.8, "top_k": 20},
        {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.3, "logprobs": 4},
        {"presence_penalty": 1.0, "logit_bias": {3: 9.0}},
    ]
    choices = [choice_of(options[i % 3], i) for i in range(len(logits))]
    on_card = torch.from_numpy(logits).to("cuda:0")
    with host_waits() as waits:
        found = sampling.choose(on_card, choices)
    assert not waits
    expected = [sample(row, choice) for row, choice in zip(logits, choices, strict=True)]
    assert found[:, 0].cpu().tolist() == expected
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=1, top_p=0.9, logprobs=2)
    answers = []
    for chooses in (True, False):
        with load_engine(store, device="cuda", dtype="float32") as engine:
            assert engine._backend is not None and engine._backend.chooses
            engine._backend.chooses = chooses
            answers.append(engine.generate_batch([("t0", "one"), ("t1", "two")], params))
    for a, b in zip(*answers, strict=True):
        assert a.token_ids == b.token_ids
        assert [p.rank for p in a.logprobs] == [p.rank for p in b.logprobs]
