"""The interface that users see: requests, results, text, errors. Run against the torch engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import (
    Engine,
    EngineError,
    Generation,
    RequestError,
    SamplingParams,
    UnknownTenantError,
    build_store,
    load_engine,
)
from tests import helpers
from tests.conftest import Family
from tests.helpers import hf_greedy, hf_logits

NUM_BASE = 4 + 256
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def byte_tokenizer(extra: list[str]) -> PreTrainedTokenizerFast:
    """Special tokens, one token a byte, then added tokens as chat fine-tunes have them."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {t: i for i, t in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if extra:
        found.add_special_tokens({"additional_special_tokens": extra})
        found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[Any]]:
    """plain: vocabulary 260; chat: a fine-tune of it with two added tokens; bare: no tokenizer and 300 tokens."""
    root = tmp_path_factory.mktemp("chatty")
    plain = helpers.random_mixtral(0, vocab_size=NUM_BASE)
    chat = helpers.tuned(plain, 1)
    chat.resize_token_embeddings(NUM_BASE + 2, mean_resizing=False)
    bare = helpers.random_mixtral(2, vocab_size=300)
    models = {"plain": plain, "chat": chat, "bare": bare}
    paths = {n: helpers.save(m, root / n) for n, m in models.items()}
    byte_tokenizer([]).save_pretrained(paths["plain"])
    byte_tokenizer(["<user>", "<bot>"]).save_pretrained(paths["chat"])
    return paths, list(models.values())


@pytest.fixture(scope="module")
def engine(chatty: tuple[dict[str, Path], list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    store = build_store(tmp_path_factory.mktemp("store") / "store", chatty[0], slots=6)
    with load_engine(store) as engine:
        yield engine


def test_tenants_of_different_vocabularies_answer_right(
    engine: Engine, chatty: tuple[dict[str, Path], list[Any]]
) -> None:
    models = [helpers.oracle(chatty[1], i, engine.plan) for i in range(3)]
    rows = [helpers.prompts(i, [6], size)[0] for i, size in enumerate((NUM_BASE, NUM_BASE + 2, 300))]
    for name, model, row in zip(engine.tenants, models, rows, strict=True):
        helpers.assert_close(engine.logits(name, [row]), hf_logits(model, [row]))
    params = [SamplingParams(max_new_tokens=8, ignore_eos=True)] * 3
    answers = engine.generate_batch(list(zip(engine.tenants, rows, strict=True)), params)
    for model, row, answer in zip(models, rows, answers, strict=True):
        assert list(answer.token_ids) == hf_greedy(model, row, 8)
    # Sampling pads to the widest vocabulary and never draws from the padding.
    hot = [SamplingParams(max_new_tokens=60, temperature=50.0, seed=i, ignore_eos=True) for i in range(3)]
    for answer in engine.generate_batch(list(zip(engine.tenants, rows, strict=True)), hot):
        assert max(answer.token_ids) < engine.store.config(answer.tenant).vocab_size


def test_text_prompts_and_chat_template(engine: Engine, chatty: tuple[dict[str, Path], list[Any]]) -> None:
    model = helpers.oracle(chatty[1], 1, engine.plan)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    ids = engine.apply_chat_template("chat", [{"role": "user", "content": "hé"}])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chatty[0]["chat"])
    assert ids == tokenizer.encode("<user>hé<bot>", add_special_tokens=False) and ids[0] == NUM_BASE
    answer = engine.generate("chat", ids, params)
    assert list(answer.token_ids) == hf_greedy(model, ids, 12)
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    plain = engine.generate("plain", "hé", params)
    assert plain.prompt_token_ids == tuple(engine.tokenize("plain", "hé")) and len(plain.prompt_token_ids) == 3
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
        return engine.generate("plain", "abc", SamplingParams(max_new_tokens=20, temperature=2.0, seed=seed)).token_ids

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
    cut = engine.generate("plain", "abc", SamplingParams(60, 1.0, seed=0, ignore_eos=True, stop=stop))
    assert cut.text == text.split(stop)[0] and cut.finish_reason == "stop"
    assert len(cut.token_ids) < 60


def test_the_generation_configs_end_token_ends_an_answer(engine: Engine) -> None:
    row = [1, 50, 60]

    def draw(seed: int, ignore_eos: bool) -> Generation:
        params = SamplingParams(max_new_tokens=100, temperature=50.0, seed=seed, ignore_eos=ignore_eos)
        return engine.generate("bare", row, params)

    # </s> of generation_config.json is drawn about once in 300 tokens: take a seed that draws it.
    seed = next(s for s in range(100) if 2 in draw(s, True).token_ids)
    free, ended = draw(seed, True), draw(seed, False)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(2) + 1]
    assert ended.finish_reason == "stop" and ended.text is None


def test_timings(engine: Engine) -> None:
    timings = engine.generate("plain", "abc", SamplingParams(max_new_tokens=4, ignore_eos=True)).timings
    assert 0 <= timings.reconfiguration <= timings.ttft <= timings.total
    assert timings.hits + timings.misses == (3 + 3) * 2 * 2


def test_switching_copies_nothing_on_a_cpu(engine: Engine) -> None:
    before = engine.stats()
    for name in ("plain", "chat", "plain", "chat"):
        engine.generate(name, [1, 2, 3], SamplingParams(max_new_tokens=1))
    after = engine.stats()
    assert after["reconfigurations"] >= before["reconfigurations"] + 3
    assert after["reconfigured_bytes"] == before["reconfigured_bytes"] == 0


def test_logits_take_arrays_and_ragged_rows(engine: Engine) -> None:
    rows = helpers.prompts(0, [5, 3])
    ragged = engine.logits("plain", rows)
    assert ragged.shape == (2, 5, NUM_BASE) and ragged.dtype == np.float32
    assert not ragged[1, 3:].any()
    ids, mask = helpers.padded(rows)
    assert np.array_equal(engine.logits("plain", ids, attention_mask=mask), ragged)
    helpers.assert_close(engine.logits("plain", np.array(rows[:1])), ragged[:1], tolerance=1e-5)


def test_many_long_rows_are_computed_in_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = helpers.prompts(0, [9, 2, 7, 7, 1])
    whole = engine.logits("plain", rows)
    monkeypatch.setattr("torch_engine.backend.LOGITS_TOKENS", 10)
    helpers.assert_close(engine.logits("plain", rows), whole, tolerance=1e-5)


BAD_REQUESTS: dict[str, tuple[Callable[[Engine], Any], type[Exception], str]] = {
    "unknown tenant": (
        lambda e: e.generate("x", "a"),
        UnknownTenantError,
        "no tenant 'x' in this store; it holds: plain",
    ),
    "unknown tenant, logits": (lambda e: e.logits("x", [[1]]), UnknownTenantError, "no tenant 'x'"),
    "path-like tenant": (lambda e: e.generate("../x", "a"), UnknownTenantError, r"no tenant '\.\./x'"),
    "empty text": (lambda e: e.generate("plain", ""), RequestError, "the prompt is empty; give some text"),
    "empty ids": (lambda e: e.generate("plain", []), RequestError, "the prompt is empty; give at least one token"),
    "no prompt": (
        lambda e: e.generate("plain", None),  # type: ignore[arg-type]
        RequestError,
        "the prompt is None; give text or a list of token ids",
    ),
    "too long": (lambda e: e.generate("plain", [1] * 257), RequestError, "257 tokens.*context of 256; shorten it"),
    "no room": (lambda e: e.generate("plain", "a" * 256), RequestError, "fills the context .*256.*shorten it"),
    "id too large": (
        lambda e: e.generate("plain", [1, NUM_BASE]),
        RequestError,
        rf"the prompt\[1\] is {NUM_BASE}, outside the vocabulary of tenant 'plain' \(0\.\.{NUM_BASE - 1}\)",
    ),
    "id of another tenant": (
        lambda e: e.generate_batch([("chat", [261]), ("plain", [261])]),
        RequestError,
        "261, outside",
    ),
    "negative id": (lambda e: e.generate("plain", [-1]), RequestError, r"the prompt\[0\] is -1, outside"),
    "float id": (lambda e: e.generate("plain", [1.5]), RequestError, "is 1.5; token ids are whole numbers"),
    "text without tokenizer": (
        lambda e: e.generate("bare", "a"),
        RequestError,
        "'bare' has no tokenizer; give the prompt",
    ),
    "stop without tokenizer": (
        lambda e: e.generate("bare", [5], SamplingParams(stop="x")),
        RequestError,
        "stop strings cannot be found; use stop_token_ids",
    ),
    "stream without tokenizer": (lambda e: e.stream("bare", [5]), RequestError, "no text to stream; use generate"),
    "params do not match": (
        lambda e: e.generate_batch([("plain", "a")], [SamplingParams()] * 2),
        RequestError,
        "2 sampling params for 1 requests",
    ),
    "logits of nothing": (lambda e: e.logits("plain", []), RequestError, r"input_ids must be \[batch, seq\]"),
    "logits of one row": (lambda e: e.logits("plain", [1, 2]), RequestError, r"input_ids must be \[batch, seq\]"),
    "logits of an empty row": (lambda e: e.logits("plain", [[1], []]), RequestError, "input_ids is empty"),
    "mask of another shape": (
        lambda e: e.logits("plain", [[1, 2]], attention_mask=[[1]]),
        RequestError,
        "another shape",
    ),
    "mask with a gap": (
        lambda e: e.logits("plain", [[1, 2, 3]], attention_mask=[[1, 0, 1]]),
        RequestError,
        "attention_mask has a gap",
    ),
    "decoder ids": (lambda e: e.logits("plain", [[1]], [[1]]), EngineError, "encoder-decoder families"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_bad_requests_are_refused_and_the_engine_goes_on(kind: str, engine: Engine) -> None:
    call, error, message = BAD_REQUESTS[kind]
    before = engine.stats()["hits"]
    with pytest.raises(error, match=message):
        call(engine)
    assert engine.stats()["hits"] == before  # nothing of a refused batch was computed
    assert engine.generate("plain", "a", SamplingParams(max_new_tokens=1)).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "backend 'jax' does not serve family 'mixtral'; use 'torch'"),
        ({"device": "tpu9"}, "device 'tpu9' is not"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there; .*use cpu"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, float32"),
        ({"device": "cpu", "dtype": "float16"}, "float16 is not computed on a CPU; use float32"),
        ({"experts": "magic"}, "experts is 'magic'"),
        ({"spare_slots": 0}, "spare_slots is 0; give a whole number from 1"),
        ({"ready_tenants": 0}, "ready_tenants is 0"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_batch_size": "4"}, "max_batch_size is '4'; give a whole number from 1"),
        ({"colour": 1}, "no option 'colour'; it has: device"),
    ],
    ids=str,
)
def test_bad_options_are_refused(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        load_engine(engine.store, **options)


def test_a_missing_framework_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_engine.backend", None)  # an import of it fails now
    with pytest.raises(EngineError, match=r"the torch backend is not installed .*pip install 'moetel\[torch\]'"):
        load_engine(engine.store)


def test_a_closed_engine_says_so(family: Family, tmp_path: Path) -> None:
    engine = load_engine(build_store(tmp_path / "store", family.paths))
    engine.close()
    engine.close()
    for call in (lambda: engine.generate("ana", [1]), lambda: engine.logits("ana", [[1]]), engine.stats):
        with pytest.raises(EngineError, match="this engine is closed; load it again"):
            call()


def test_no_requests_no_answers(engine: Engine) -> None:
    assert engine.generate_batch([]) == []
