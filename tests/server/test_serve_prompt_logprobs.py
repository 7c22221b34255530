"""Log probabilities of prompts over HTTP, against what transformers' softmax gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from common import build_store, load_engine
from common.build.scoring import log_softmax
from tests import helpers
from tests.server.live import Live, Loop, error, events
from tests.server.speaking import CHAT, complete


@pytest.fixture(scope="module")
def scores(paths: dict[str, Path], speaking: Loop) -> Any:
    """ids -> log probabilities at every position, [tokens, vocab], by transformers."""
    models = [helpers.load(path) for path in paths.values()]
    model = helpers.oracle_of_store(speaking.engine.store, models, list(paths).index("words"))
    return lambda ids: log_softmax(helpers.hf_logits(model, [list(ids)])[0])


def test_echo_with_logprobs(words: Live, hf: Any, scores: Any) -> None:
    text = "the people of the town caf\u00e9"
    found = complete(words, prompt=text, echo=True, logprobs=2, max_tokens=3, ignore_eos=True)
    ids, answer = found["prompt_token_ids"], found["token_ids"]
    assert ids == hf(text)["input_ids"] and len(answer) == 3
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"]
    assert found["text"].startswith(text)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    whole = [*ids, *answer]
    expected = scores(whole)
    given = logprobs["token_logprobs"][1:]
    assert given == pytest.approx([expected[i, t] for i, t in enumerate(whole[1:])], abs=1e-4)
    for i, top in enumerate(logprobs["top_logprobs"][1:]):
        assert max(top.values()) == pytest.approx(expected[i].max(), abs=1e-4)
        assert given[i] in top.values()
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert found["text"][offset : offset + len(token)] == token
    ids_named = complete(
        words, prompt=text, echo=True, logprobs=0, return_tokens_as_token_ids=True, max_tokens=1
    )
    assert ids_named["text"].startswith(text)
    assert ids_named["logprobs"]["tokens"][: len(ids)] == [f"token_id:{i}" for i in ids]


def test_echo_in_a_stream_and_of_many_prompts(words: Live) -> None:
    body = {
        "model": "words",
        "prompt": ["the people", "of the town"],
        "n": 2,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
    }
    whole = words.post("/v1/completions", body).json()["choices"]
    *chunks, done = events(words.post("/v1/completions", body | {"stream": True}).text)
    assert done == "[DONE]"
    for choice in whole:
        mine = [
            c for e in chunks for c in json.loads(e)["choices"] if c["index"] == choice["index"]
        ]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert len(mine[0]["logprobs"]["tokens"]) > 1
        for name in ("tokens", "text_offset"):
            joined = [x for c in mine for x in c["logprobs"][name]]
            assert joined == choice["logprobs"][name]
        joined = [x for c in mine for x in c["logprobs"]["token_logprobs"]]
        assert joined[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone(words: Live, stream: bool) -> None:
    asked = {"model": "words", "prompt": "the people", "echo": True, "logprobs": 1, "max_tokens": 0}
    whole = complete(words, prompt="the people", echo=True, logprobs=1, max_tokens=1)
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        first, last, done = events(words.post("/v1/completions", asked).text)
        found, usage = json.loads(first)["choices"][0], json.loads(last)["usage"]
        assert done == "[DONE]"
    else:
        reply = words.post("/v1/completions", asked).json()
        found, usage = reply["choices"][0], reply["usage"]
    assert found["text"] == "the people" and found["finish_reason"] == "length"
    for name in ("tokens", "text_offset"):
        assert found["logprobs"][name] == whole["logprobs"][name][:-1]
    assert len(found["logprobs"]["token_logprobs"]) == usage["prompt_tokens"]
    assert usage["completion_tokens"] == 0 and usage["total_tokens"] == usage["prompt_tokens"]
    del asked["echo"]
    assert error(words.post("/v1/completions", asked), 400)["param"] == "max_tokens"


def check_prompt(found: list[Any], ids: list[int], expected: np.ndarray, top: int, hf: Any) -> None:
    assert found[0] is None and len(found) == len(ids)
    for i, (each, token_id) in enumerate(zip(found[1:], ids[1:], strict=True)):
        mine = each[str(token_id)]
        assert mine["logprob"] == pytest.approx(expected[i, token_id], abs=1e-4)
        assert mine["rank"] == int((expected[i] > expected[i, token_id]).sum()) + 1
        best = np.argsort(-expected[i])[:top]
        assert set(each) == {str(token_id), *map(str, best)}
        for rank, other in enumerate(best, 1):
            assert each[str(other)]["rank"] == rank
            assert each[str(other)]["logprob"] == pytest.approx(expected[i, other], abs=1e-4)


def test_prompt_logprobs_of_completions(words: Live, hf: Any, scores: Any) -> None:
    found = complete(words, prompt="the people of the town", prompt_logprobs=3)
    ids = found["prompt_token_ids"]
    check_prompt(found["prompt_logprobs"], ids, scores(ids), 3, hf)
    assert found["logprobs"] is None
    text = "".join(
        each[str(i)]["decoded_token"]
        for each, i in zip(found["prompt_logprobs"][1:], ids[1:], strict=True)
    )
    assert text == "the people of the town"
    both = complete(words, prompt="the people", prompt_logprobs=0, echo=True, logprobs=2)
    assert all(len(each) == 1 for each in both["prompt_logprobs"][1:])
    assert all(len(top) >= 2 for top in both["logprobs"]["top_logprobs"][1:])
    assert "prompt_logprobs" not in complete(words)


def test_prompt_logprobs_of_conversations(words: Live, hf: Any, scores: Any) -> None:
    client = OpenAI(base_url=f"{words.url}/v1", api_key="none")
    found = client.chat.completions.create(
        model="words",
        messages=CHAT["messages"],
        max_tokens=2,
        extra_body={"prompt_logprobs": 1, "return_token_ids": True},
    ).model_dump()
    ids = found["prompt_token_ids"]
    check_prompt(found["prompt_logprobs"], ids, scores(ids), 1, hf)


def test_the_whole_prompt_is_computed(live: Live) -> None:
    body = {"model": "ana", "prompt": "p" * 50, "max_tokens": 1, "temperature": 0}
    for more, cached in (({}, 0), ({}, 48), ({"prompt_logprobs": 0}, 0), ({"logprobs": 1}, 48)):
        usage = live.post("/v1/completions", body | more).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached, more


@pytest.mark.parametrize("wrong", [-1, 21, "1", True])
def test_bounds(words: Live, wrong: Any) -> None:
    for path, body in (("completions", {"prompt": "the people"}), ("chat/completions", CHAT)):
        reply = words.post(f"/v1/{path}", {"model": "words"} | body | {"prompt_logprobs": wrong})
        assert error(reply, 400)["param"] == "prompt_logprobs"


def test_a_prompt_of_one_token_has_none(words: Live, hf: Any) -> None:
    found = complete(words, prompt=[hf.bos_token_id], prompt_logprobs=2, echo=True, logprobs=1)
    assert found["prompt_logprobs"] == [None]
    assert found["logprobs"]["token_logprobs"][0] is None


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("jax")
    store = tmp_path_factory.mktemp("switch") / "store"
    build_store(store, {"fr": helpers.REPOSITORY / "examples" / "tenants" / "switch" / "fr"})
    loop = Loop(load_engine(store, device="cpu"))
    with loop.serve() as live:
        yield live
    loop.close()


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}], ids=str)
def test_encoder_decoders_have_none(switch: Live, asked: dict[str, Any]) -> None:
    reply = switch.post("/v1/completions", {"model": "fr", "prompt": "12"} | asked)
    assert "is an encoder-decoder" in error(reply, 400)["message"]
    usage = switch.post("/v1/completions", {"model": "fr", "prompt": "12"}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
