"""Log probabilities of prompts in Python, against transformers' softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import RequestError, SamplingParams, SchedulerOptions, build_store, load_engine
from common.build.scoring import log_softmax
from common.serving.sampling import TokenLogprob
from common.store import Store
from tests import helpers
from tests.conftest import Family
from tests.helpers import hf_logits, prompts


@pytest.fixture(scope="module")
def store(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("prompt_logprobs") / "store"
    return helpers.build_round_robin(path, family.paths, slots=5)


def params(top: int, **more: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 3, "prompt_logprobs": top} | more))


def check(found: tuple[TokenLogprob | None, ...], expected: np.ndarray, ids: list[int]) -> None:
    """expected: log probabilities [tokens, vocab] of the whole prompt."""
    assert len(found) == len(ids) and found[0] is None
    for i, token in enumerate(found[1:]):
        assert token is not None and token.token_id == ids[i + 1]
        assert token.logprob == pytest.approx(expected[i, token.token_id], abs=1e-4)
        best = np.argsort(-expected[i])[: len(token.top)]
        np.testing.assert_allclose([p for _, p in token.top], expected[i, best], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 128])
def test_prompts_are_scored_as_transformers_scores_them(
    family: Family, store: Store, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """In steps of many chunks, and few rows of the vocabulary at a time."""
    from torch_engine import prompt_logprobs

    most = []
    heads = prompt_logprobs.heads

    def watched(segments: Any, hidden: Any) -> Any:
        most.append(max(len(x) for x in hidden))
        return heads(segments, hidden)

    monkeypatch.setattr(prompt_logprobs, "ROWS", rows)
    monkeypatch.setattr(prompt_logprobs, "heads", watched)
    asked = list(zip(family.names, prompts(0, [60, 33, 1]), strict=True))
    options = SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=32, prefill_chunk=12)
    with load_engine(store, scheduler=options) as engine:
        found = engine.generate_batch(asked, params(4))
        again = engine.generate_batch(asked, params(4))
        assert all(f.num_cached_tokens == 0 for f in again)
    assert 0 < max(most) <= rows
    for (name, ids), one, other in zip(asked, found, again, strict=True):
        model = helpers.oracle(family.models, family.names.index(name), store.plan)
        check(one.prompt_logprobs, log_softmax(hf_logits(model, [ids])[0]), ids)
        check(other.prompt_logprobs, log_softmax(hf_logits(model, [ids])[0]), ids)
        assert list(one.token_ids) == helpers.hf_greedy(model, ids, 3)


def test_a_request_that_was_put_off_has_each_of_them_once(family: Family, store: Store) -> None:
    rows = prompts(1, [30, 30])
    with load_engine(store) as engine:
        pool = engine._require_backend().cache.pool  # type: ignore[attr-defined]
        pool._empty[:] = pool._empty[:8]
        more = {"max_new_tokens": 70, "ignore_eos": True}
        asked = [
            engine.submit(family.names[i], row, params(2, **more)) for i, row in enumerate(rows)
        ]
        while engine.step():
            pass
        assert engine.stats()["preemptions"] > 0
    for i, (request, row) in enumerate(zip(asked, rows, strict=True)):
        model = helpers.oracle(family.models, i, store.plan)
        expected = log_softmax(hf_logits(model, [row])[0])
        check(request.generation().prompt_logprobs, expected, row)


def test_none_where_nobody_asked(family: Family, store: Store) -> None:
    with load_engine(store) as engine:
        assert engine.generate(family.names[0], [5, 6, 7]).prompt_logprobs == ()
    for wrong in (-1, 21, 1.5, True):
        with pytest.raises(RequestError, match="prompt_logprobs is"):
            SamplingParams(prompt_logprobs=wrong)  # type: ignore[arg-type]


def test_encoder_decoders_refuse(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("jax")
    path = tmp_path_factory.mktemp("switch") / "store"
    tenant = helpers.REPOSITORY / "examples" / "tenants" / "switch" / "fr"
    build_store(path, {"fr": tenant})
    with load_engine(path) as engine:
        with pytest.raises(RequestError, match=r"'fr' is an encoder-decoder: it reads a prompt"):
            engine.generate("fr", "12", params(1))
