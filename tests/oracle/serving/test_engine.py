"""The interface that users see: requests, results and text. One suite, run against every engine."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from common import (
    Engine,
    Generation,
    RequestError,
    SamplingParams,
)
from tests import helpers
from tests.byte_tokenizer import NUM_BASE
from tests.oracle.serving.kinds import Kind


def test_tenants_of_different_vocabularies_answer_right(engine: Engine, chatty: Kind) -> None:
    models = [chatty.oracle(i, engine.plan) for i in range(3)]
    rows = [
        helpers.prompts(i, [6], size)[0] for i, size in enumerate((NUM_BASE, NUM_BASE + 2, 300))
    ]
    for name, model, row in zip(engine.tenants, models, rows, strict=True):
        helpers.assert_close(chatty.logits(engine, name, [row]), chatty.hf_logits(model, row))
    params = [SamplingParams(max_new_tokens=8, ignore_eos=True)] * 3
    answers = engine.generate_batch(list(zip(engine.tenants, rows, strict=True)), params)
    for model, row, answer in zip(models, rows, answers, strict=True):
        assert list(answer.token_ids) == chatty.greedy(model, row, 8)
    # Sampling pads to the widest vocabulary and never draws from the padding.
    hot = [
        SamplingParams(max_new_tokens=60, temperature=50.0, seed=i, ignore_eos=True)
        for i in range(3)
    ]
    for answer in engine.generate_batch(list(zip(engine.tenants, rows, strict=True)), hot):
        assert max(answer.token_ids) < engine.store.config(answer.tenant).vocab_size


def test_text_prompts_and_chat_template(engine: Engine, chatty: Kind) -> None:
    model = chatty.oracle(1, engine.plan)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    ids = engine.apply_chat_template("chat", [{"role": "user", "content": "hé"}])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chatty.paths["chat"])
    assert ids == tokenizer.encode("<user>hé<bot>", add_special_tokens=False) and ids[0] == NUM_BASE
    answer = engine.generate("chat", ids, params)
    assert list(answer.token_ids) == chatty.greedy(model, ids, 12)
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    plain = engine.generate("plain", "hé", params)
    assert (
        plain.prompt_token_ids == tuple(engine.tokenize("plain", "hé"))
        and len(plain.prompt_token_ids) == 3
    )
    with pytest.raises(RequestError, match="'plain' has no chat template"):
        engine.apply_chat_template("plain", [])


def test_streaming_gives_the_same_text(engine: Engine) -> None:
    for seed in range(4):
        params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=seed)
        whole = engine.generate("plain", "abc", params)
        found = list(engine.stream("plain", "abc", params))
        assert "".join(found) == whole.text and all(found)


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    def draw(seed: int | None) -> tuple[int, ...]:
        return engine.generate(
            "plain", "abc", SamplingParams(max_new_tokens=20, temperature=2.0, seed=seed)
        ).token_ids

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    # What else is in the batch does not matter.
    params = SamplingParams(max_new_tokens=20, temperature=2.0, seed=3)
    batch = engine.generate_batch([("chat", "x"), ("plain", "abc"), ("plain", "abc")], params)
    assert batch[1].token_ids == batch[2].token_ids == draw(3)


def test_stop_strings_end_an_answer(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=0, ignore_eos=True)
    text = engine.generate("plain", "abc", params).text
    assert text is not None
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = engine.generate(
        "plain", "abc", SamplingParams(60, 1.0, seed=0, ignore_eos=True, stop=stop)
    )
    assert cut.text == text.split(stop)[0] and cut.finish_reason == "stop"
    assert len(cut.token_ids) < 60


def test_the_generation_configs_end_token_ends_an_answer(engine: Engine) -> None:
    row = [1, 50, 60]

    def draw(seed: int, ignore_eos: bool) -> Generation:
        params = SamplingParams(
            max_new_tokens=100, temperature=50.0, seed=seed, ignore_eos=ignore_eos
        )
        return engine.generate("bare", row, params)

    # </s> of generation_config.json is drawn about once in 300 tokens: take a seed that draws it.
    seed = next(s for s in range(100) if 2 in draw(s, True).token_ids)
    free, ended = draw(seed, True), draw(seed, False)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(2) + 1]
    assert ended.finish_reason == "stop" and ended.text is None


def test_timings(engine: Engine, chatty: Kind) -> None:
    timings = engine.generate(
        "plain", "abc", SamplingParams(max_new_tokens=4, ignore_eos=True)
    ).timings
    assert 0 <= timings.reconfiguration <= timings.ttft <= timings.total
    assert timings.hits + timings.misses == chatty.lookups(prompt=3, new=4)


def test_switching_copies_nothing_on_a_cpu(engine: Engine) -> None:
    before = engine.stats()
    for name in ("plain", "chat", "plain", "chat"):
        engine.generate(name, [1, 2, 3], SamplingParams(max_new_tokens=1))
    after = engine.stats()
    assert after["reconfigurations"] >= before["reconfigurations"] + 3
    assert after["reconfigured_bytes"] == before["reconfigured_bytes"] == 0


def test_logits_take_arrays_and_ragged_rows(engine: Engine, chatty: Kind) -> None:
    rows = helpers.prompts(0, [5, 3])
    ragged = chatty.logits(engine, "plain", rows)
    assert ragged.shape == (2, 5, NUM_BASE) and ragged.dtype == np.float32
    assert not ragged[1, 3:].any()
    helpers.assert_close(
        chatty.logits(engine, "plain", np.array(rows[:1])), ragged[:1], tolerance=1e-5
    )
    ids, mask = helpers.padded(rows)
    if chatty.backend == "torch":
        assert np.array_equal(engine.logits("plain", ids, attention_mask=mask), ragged)
    else:
        answers = [[0, 5]] * 2
        masked = engine.logits("plain", ids, answers, attention_mask=mask)
        assert np.array_equal(masked, engine.logits("plain", rows, answers))


def test_many_long_rows_are_computed_in_parts(
    engine: Engine, chatty: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = helpers.prompts(0, [9, 2, 7, 7, 1])
    whole = chatty.logits(engine, "plain", rows)
    bound = {
        "torch": "torch_engine.backend.LOGITS_TOKENS",
        "jax": "jax_engine.steps.scoring.MOST_TOKENS",
    }[chatty.backend]
    monkeypatch.setattr(bound, 10)
    helpers.assert_close(chatty.logits(engine, "plain", rows), whole, tolerance=1e-5)


def test_no_requests_no_answers(engine: Engine) -> None:
    assert engine.generate_batch([]) == []
