"""Answers of random models that have to be JSON, or of a grammar, judged by other libraries."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import RequestError, SamplingParams, StructuredOutputs, build_store, load_engine
from common.serving.engine import Engine
from common.serving.scheduler_options import SchedulerOptions
from tests import helpers
from tests.byte_tokenizer import byte_tokenizer
from tests.server import speech

pytest.importorskip("llguidance", reason="structured outputs need llguidance")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A tenant that speaks in bytes, one with words and bytes as Mixtral's, one without a
    tokenizer."""
    root = tmp_path_factory.mktemp("structured")
    tokenizers = {"ana": byte_tokenizer([]), "bob": speech.metaspace(), "ids": None}
    base = helpers.random_mixtral(0, vocab_size=420, max_position_embeddings=2048, eos_token_id=2)
    paths = {}
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        paths[name] = helpers.save(helpers.tuned(base, seed), root / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(paths[name])
    build_store(root / "store", paths, policy="round_robin")
    options = SchedulerOptions(max_num_seqs=8)
    with load_engine(root / "store", device="cpu", scheduler=options) as made:
        yield made


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of values that end: bounded strings, numbers and lists."""
    kinds = ["string", "integer", "boolean", "null", "enum", "number"]
    kinds += ["object", "array", "anyOf"] if depth < 3 else []
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "string":
        return rng.choice(
            [
                {"type": "string", "maxLength": rng.randint(0, 6)},
                {"type": "string", "pattern": "^[a-f]{2,4}$"},
                {"type": "string", "format": "date"},
            ]
        )
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, "ü"], rng.randint(1, 4))}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "array":
        least = rng.randint(0, 2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
    if kind == "object":
        names = rng.sample(["name", "age", "where", "a b", "ö", "x"], rng.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": names[: rng.randint(1, len(names))],
            "additionalProperties": False,
        }
    return {"type": kind}


def structured(seed: int, wanted: StructuredOutputs, count: int = 400, **more: Any) -> Any:
    return SamplingParams(
        max_new_tokens=count, temperature=1.0, seed=seed, structured_outputs=wanted, **more
    )


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_answers_are_of_their_schemas(engine: Engine, first: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    requests, schemas = [], []
    for seed in range(first, first + 20):
        schemas.append(random_schema(random.Random(seed)))
        wanted = StructuredOutputs(json=schemas[-1], disable_any_whitespace=True)
        requests.append(
            engine.submit(("ana", "bob")[seed % 2], f"number {seed}", structured(seed, wanted))
        )
    while engine.step():
        pass
    ended = 0
    for schema, request in zip(schemas, requests, strict=True):
        assert request.error is None
        answer = request.generation()
        if answer.finish_reason == "length":
            continue
        ended += 1
        assert answer.finish_reason == "stop"
        jsonschema.validate(
            json.loads(str(answer.text)), schema, format_checker=jsonschema.FormatChecker()
        )
    assert ended >= 19, "schemas are bounded, so that answers end"


def test_the_same_in_a_stream_and_after_a_preemption(engine: Engine) -> None:
    wanted = StructuredOutputs(json=random_schema(random.Random(3)), disable_any_whitespace=True)
    whole = engine.generate("ana", "hello", structured(7, wanted))
    pieces = list(engine.stream("ana", "hello", structured(7, wanted)))
    assert "".join(pieces) == whole.text and json.loads(str(whole.text)) is not None
    request = engine.submit("ana", "hello", structured(7, wanted))
    for _ in range(5):
        engine.step()
    engine._steps.scheduler._put_off(request)
    while engine.step():
        pass
    assert request.generation().text == whole.text and request.preemptions == 1


def test_every_kind(engine: Engine) -> None:
    for seed in range(5):
        choice = engine.generate(
            "bob", "x", structured(seed, StructuredOutputs(choice=["yes", "no", "maybe ü"]))
        )
        assert choice.text in ("yes", "no", "maybe ü") and choice.finish_reason == "stop"
        pattern = r"[A-Z][a-z]{3,5} \d{4}"
        matched = engine.generate("ana", "x", structured(seed, StructuredOutputs(regex=pattern)))
        assert re.fullmatch(pattern, str(matched.text))
        lark = 'start: greeting " " name\ngreeting: "hello" | "bye"\nname: /[a-z]{1,4}/'
        said = engine.generate("ana", "x", structured(seed, StructuredOutputs(grammar=lark)))
        assert re.fullmatch(r"(hello|bye) [a-z]{1,4}", str(said.text))
    greedy = SamplingParams(
        max_new_tokens=9, structured_outputs=StructuredOutputs(choice=["left", "right"])
    )
    assert engine.generate("ana", "x", greedy).text in ("left", "right")
    started = engine.generate(
        "ana", "x", structured(0, StructuredOutputs(json_object=True), count=40)
    )
    assert str(started.text).lstrip().startswith("{")


def test_other_options_keep_to_the_grammar(engine: Engine) -> None:
    """Even where they alone would not."""
    wanted = StructuredOutputs(choice=["aaaa", "bbbb"])
    a = engine.tokenize("ana", "a", add_special_tokens=False)[0]
    for more in (
        {"logit_bias": {a: -100.0}, "frequency_penalty": 2.0},
        {"min_tokens": 8},
        {"ignore_eos": True},
        {"top_k": 1},
        {"repetition_penalty": 5.0, "logprobs": 2},
    ):
        answer = engine.generate("ana", "x", structured(1, wanted, count=30, **more))
        assert answer.text in ("aaaa", "bbbb") and answer.finish_reason == "stop", more
    stopped = engine.generate(
        "ana", "x", structured(1, StructuredOutputs(choice=["abc"]), stop="b")
    )
    assert stopped.text == "a" and stopped.stop_reason == "b"
    cut = engine.generate("ana", "x", structured(1, wanted, count=2))
    assert cut.text in ("aa", "bb") and cut.finish_reason == "length"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "is empty; give exactly one of json, regex"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice"),
        ({"choice": []}, "choice is \\[\\]; give a list of texts"),
        ({"json": "{"}, "json is no JSON schema"),
        ({"regex": 3}, "regex is 3; give text"),
    ],
)
def test_what_is_malformed_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"structured_outputs.* ?{message}"):
        StructuredOutputs(**wanted)


def test_what_cannot_be_done_is_refused(engine: Engine) -> None:
    for wanted, what in (
        (StructuredOutputs(regex="(a"), "regex cannot be used"),
        (StructuredOutputs(json={"type": "nonsense"}), "json cannot be used"),
        (StructuredOutputs(grammar="start: missing"), "grammar cannot be used"),
    ):
        with pytest.raises(RequestError, match=f"structured_outputs.{what}"):
            engine.generate("ana", "x", structured(0, wanted))
    with pytest.raises(RequestError, match="'ids' has no tokenizer; structured_outputs need one"):
        engine.generate("ids", [5, 6], structured(0, StructuredOutputs(regex="a")))


@pytest.mark.slow
def test_the_jax_engine_keeps_to_them_too(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from tests import switch_models

    base = switch_models.random_switch(0, vocab_size=280)
    paths = {}
    for seed, name in enumerate(("ana", "bob")):
        paths[name] = helpers.save(switch_models.tuned(base, seed), tmp_path / name)
        byte_tokenizer([]).save_pretrained(paths[name])
    build_store(tmp_path / "store", paths, policy="round_robin")
    wanted = StructuredOutputs(regex="[0-9]{2}-[a-c]{3}")
    with load_engine(tmp_path / "store", device="cpu") as engine:
        for name in paths:
            answer = engine.generate(name, "hello", structured(1, wanted, count=20))
            assert re.fullmatch("[0-9]{2}-[a-c]{3}", str(answer.text))
