"""The interface that users see: requests, results, text, errors. One suite, run against every
engine."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common.build.build
from common import (
    Engine,
    EngineError,
    Generation,
    Plan,
    RequestError,
    SamplingParams,
    UnknownTenantError,
    load_engine,
)
from tests import helpers, switch_models

# The plans that these tests state are those of the paper's rule.
build_store = partial(common.build.build.build_store, policy="round_robin")

NUM_BASE = 4 + 256
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"  # noqa: E501


def byte_tokenizer(extra: list[str]) -> PreTrainedTokenizerFast:
    """Special tokens, one token a byte, then added tokens as chat fine-tunes have them."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {t: i for i, t in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    if extra:
        found.add_special_tokens({"additional_special_tokens": extra})
        found.chat_template = TEMPLATE
    return found


class Kind(ABC):
    """What the suite needs to know of a family: its models, by Hugging Face alone, and how they are
    called."""

    backend: str
    context: int
    models: list[Any]
    paths: dict[str, Path]

    @abstractmethod
    def make(self, seed: int, vocab_size: int) -> Any: ...

    @abstractmethod
    def tune(self, model: Any, seed: int) -> Any: ...

    @abstractmethod
    def oracle(self, index: int, plan: Plan) -> Any: ...

    @abstractmethod
    def greedy(self, model: Any, row: list[int], count: int) -> list[int]: ...

    @abstractmethod
    def logits(self, engine: Engine, tenant: str, rows: Any) -> np.ndarray:
        """The engine's, for rows of the sequence that logits are given for; other input is
        fixed."""

    @abstractmethod
    def hf_logits(self, model: Any, row: list[int]) -> np.ndarray: ...

    @abstractmethod
    def lookups(self, prompt: int, new: int) -> int:
        """Expert look-ups of a request."""


class Mixtral(Kind):
    backend, context = "torch", 256

    def make(self, seed: int, vocab_size: int) -> Any:
        return helpers.random_mixtral(seed, vocab_size=vocab_size)

    def tune(self, model: Any, seed: int) -> Any:
        return helpers.tuned(model, seed)

    def oracle(self, index: int, plan: Plan) -> Any:
        return helpers.oracle(self.models, index, plan)

    def greedy(self, model: Any, row: list[int], count: int) -> list[int]:
        return helpers.hf_greedy(model, row, count)

    def logits(self, engine: Engine, tenant: str, rows: Any) -> np.ndarray:
        return engine.logits(tenant, rows)

    def hf_logits(self, model: Any, row: list[int]) -> np.ndarray:
        return helpers.hf_logits(model, [row])

    def lookups(self, prompt: int, new: int) -> int:
        return (prompt + new - 1) * 2 * 2


class Switch(Kind):
    backend, context = "jax", 4096
    prompt: ClassVar[list[int]] = [7, 8, 9, 10]

    def make(self, seed: int, vocab_size: int) -> Any:
        return switch_models.random_switch(seed, vocab_size=vocab_size, eos_token_id=2)

    def tune(self, model: Any, seed: int) -> Any:
        return switch_models.tuned(model, seed)

    def oracle(self, index: int, plan: Plan) -> Any:
        return switch_models.oracle(self.models, index, plan)

    def greedy(self, model: Any, row: list[int], count: int) -> list[int]:
        return switch_models.hf_greedy(model, row, count)

    def logits(self, engine: Engine, tenant: str, rows: Any) -> np.ndarray:
        return engine.logits(tenant, [self.prompt] * len(rows), rows)

    def hf_logits(self, model: Any, row: list[int]) -> np.ndarray:
        return switch_models.hf_logits(model, [self.prompt], [row])

    def lookups(self, prompt: int, new: int) -> int:
        return prompt + new


@pytest.fixture(scope="module", params=[Mixtral, Switch], ids=lambda kind: kind.__name__)
def chatty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """plain: vocabulary 260; chat: a fine-tune of it with two added tokens; bare: no tokenizer and
    300 tokens."""
    kind: Kind = request.param()
    pytest.importorskip(kind.backend)
    root = tmp_path_factory.mktemp("chatty")
    plain = kind.make(0, NUM_BASE)
    chat = kind.tune(plain, 1)
    chat.resize_token_embeddings(NUM_BASE + 2, mean_resizing=False)
    models = {"plain": plain, "chat": chat, "bare": kind.make(2, 300)}
    kind.models = list(models.values())
    kind.paths = {n: helpers.save(m, root / n) for n, m in models.items()}
    byte_tokenizer([]).save_pretrained(kind.paths["plain"])
    byte_tokenizer(["<user>", "<bot>"]).save_pretrained(kind.paths["chat"])
    return kind


@pytest.fixture(scope="module")
def engine(chatty: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    store = build_store(tmp_path_factory.mktemp("store") / "store", chatty.paths, slots=6)
    with load_engine(store) as engine:
        yield engine


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


BAD_REQUESTS: dict[str, tuple[Callable[[Engine], Any], type[Exception], str]] = {
    "unknown tenant": (
        lambda e: e.generate("x", "a"),
        UnknownTenantError,
        "no tenant 'x' in this store; it holds: plain",
    ),
    "unknown tenant, logits": (
        lambda e: e.logits("x", [[1]], [[1]]),
        UnknownTenantError,
        "no tenant 'x'",
    ),
    "path-like tenant": (
        lambda e: e.generate("../x", "a"),
        UnknownTenantError,
        r"no tenant '\.\./x'",
    ),
    "empty text": (
        lambda e: e.generate("plain", ""),
        RequestError,
        "the prompt is empty; give some text",
    ),
    "empty ids": (
        lambda e: e.generate("plain", []),
        RequestError,
        "the prompt is empty; give at least one token",
    ),
    "no prompt": (
        lambda e: e.generate("plain", None),  # type: ignore[arg-type]
        RequestError,
        "the prompt is None; give text or a list of token ids",
    ),
    "too long": (
        lambda e: e.generate("plain", [1] * 4097),
        RequestError,
        "4097 tokens.*context of (256|4096); shorten it",
    ),
    "id too large": (
        lambda e: e.generate("plain", [1, NUM_BASE]),
        RequestError,
        rf"the prompt\[1\] is {NUM_BASE}, outside the vocabulary of tenant 'plain' "
        rf"\(0\.\.{NUM_BASE - 1}\)",
    ),
    "id of another tenant": (
        lambda e: e.generate_batch([("chat", [261]), ("plain", [261])]),
        RequestError,
        "261, outside",
    ),
    "negative id": (
        lambda e: e.generate("plain", [-1]),
        RequestError,
        r"the prompt\[0\] is -1, outside",
    ),
    "float id": (
        lambda e: e.generate("plain", [1.5]),
        RequestError,
        "is 1.5; token ids are whole numbers",
    ),
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
    "stream without tokenizer": (
        lambda e: e.stream("bare", [5]),
        RequestError,
        "no text to stream; use generate",
    ),
    "params do not match": (
        lambda e: e.generate_batch([("plain", "a")], [SamplingParams()] * 2),
        RequestError,
        "2 sampling params for 1 requests",
    ),
    "logits of nothing": (
        lambda e: either(e, []),
        RequestError,
        r"input_ids must be \[batch, seq\]",
    ),
    "logits of one row": (
        lambda e: either(e, [1, 2]),
        RequestError,
        r"input_ids must be \[batch, seq\]",
    ),
    "logits of an empty row": (lambda e: either(e, [[1], []]), RequestError, "input_ids is empty"),
    "mask of another shape": (
        lambda e: either(e, [[1, 2]], attention_mask=[[1]]),
        RequestError,
        "another shape",
    ),
    "mask with a gap": (
        lambda e: either(e, [[1, 2, 3]], attention_mask=[[1, 0, 1]]),
        RequestError,
        "attention_mask has a gap",
    ),
    "decoder ids wrongly there or absent": (
        lambda e: e.logits(
            "plain", [[1]], None if e.store.config("plain").is_encoder_decoder else [[1]]
        ),
        RequestError,
        "reads input_ids alone; give what|needs decoder_input_ids as well; give what",
    ),
}


def either(engine: Engine, ids: Any, **options: Any) -> np.ndarray:
    """`logits` with decoder_input_ids where the family takes them."""
    decoder = [[1]] * max(1, len(ids)) if engine.store.config("plain").is_encoder_decoder else None
    return engine.logits("plain", ids, decoder, **options)


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_bad_requests_are_refused_and_the_engine_goes_on(kind: str, engine: Engine) -> None:
    call, error, message = BAD_REQUESTS[kind]
    before = engine.stats()["hits"]
    with pytest.raises(error, match=message):
        call(engine)
    assert engine.stats()["hits"] == before  # nothing of a refused batch was computed
    assert engine.generate("plain", "a", SamplingParams(max_new_tokens=1)).token_ids


BAD_OPTIONS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "torch": [
        ({"backend": "jax"}, "backend 'jax' does not serve family 'mixtral'; use 'torch'"),
        ({"device": "tpu9"}, "device 'tpu9' is not"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there; .*use cpu"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, float32"),
        ({"device": "cpu", "dtype": "float16"}, "float16 is not computed on a CPU; use float32"),
        ({"experts": "magic"}, "experts is 'magic'"),
    ],
    "jax": [
        (
            {"backend": "torch"},
            "backend 'torch' does not serve family 'switch_transformers'; use 'jax'",
        ),
        ({"device": "tpu9"}, "device is 'tpu9'; choose one of auto, cpu"),
        ({"device": "tpu"}, "device 'tpu' is not there .*; use auto or cpu"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, float32"),
        ({"products": "magic"}, "products is 'magic'; choose"),
        ({"mesh": (1, 2, 3)}, r"mesh is \(1, 2, 3\); give \(data, expert\)"),
        ({"mesh": (4, 64)}, "needs 256 devices, jax sees"),
        ({"expert_capacity": 0}, "expert_capacity is 0; give a whole number"),
    ],
}
for _backend in BAD_OPTIONS:
    BAD_OPTIONS[_backend] += [
        ({"spare_slots": 0}, "spare_slots is 0; give a whole number from 1"),
        ({"ready_tenants": 0}, "ready_tenants is 0"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_batch_size": "4"}, "max_batch_size is '4'; give a whole number from 1"),
        ({"colour": 1}, "no option 'colour'; it has: "),
    ]


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [(backend, *case) for backend, cases in BAD_OPTIONS.items() for case in cases],
    ids=str,
)
def test_bad_options_are_refused(
    engine: Engine, chatty: Kind, backend: str, options: dict[str, Any], message: str
) -> None:
    if backend != chatty.backend:
        pytest.skip("options of the other engine")
    with pytest.raises(EngineError, match=message):
        load_engine(engine.store, **options)


def test_a_missing_framework_is_named(
    engine: Engine, chatty: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = chatty.backend
    monkeypatch.setitem(sys.modules, f"{name}_engine.backend", None)  # an import of it fails now
    with pytest.raises(
        EngineError, match=rf"the {name} backend is not installed .*pip install 'moetel\[{name}\]'"
    ):
        load_engine(engine.store)


def test_a_closed_engine_says_so(chatty: Kind, tmp_path: Path) -> None:
    engine = load_engine(build_store(tmp_path / "store", chatty.paths))
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate("bare", [1]),
        lambda: chatty.logits(engine, "bare", [[1]]),
        engine.stats,
    ):
        with pytest.raises(EngineError, match="this engine is closed; load it again"):
            call()


def test_no_requests_no_answers(engine: Engine) -> None:
    assert engine.generate_batch([]) == []
