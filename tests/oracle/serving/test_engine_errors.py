"""What users ask wrongly is refused by name, and the engine goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    Engine,
    EngineError,
    RequestError,
    SamplingParams,
    UnknownTenantError,
    load_engine,
)
from tests.byte_tokenizer import NUM_BASE
from tests.helpers import build_round_robin
from tests.oracle.serving.kinds import Kind

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
    engine = load_engine(build_round_robin(tmp_path / "store", chatty.paths))
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate("bare", [1]),
        lambda: chatty.logits(engine, "bare", [[1]]),
        engine.stats,
    ):
        with pytest.raises(EngineError, match="this engine is closed; load it again"):
            call()
