"""Names of tokens in log probabilities, beside the text that transformers decodes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from common.serving.sampling import TokenLogprob
from common.serving.tenant_text import TenantText
from scripts.server.tokens import TokenTexts
from tests.server import speech
from tests.server.live import Live, Loop, events

PROMPTS = ("the people could find", "日", "")
ANSWERS = (
    " some words",
    "some words that",
    " café, naïve 🙃 日本語 don't .",
    "🙃🙃",
    "there <|im_end|> more\n",
    " and [INST] , more . of 's them",
)


class Speaker:
    """As much of an engine as names of tokens need."""

    def __init__(self, path: Path):
        self._text = TenantText("t", path)

    def text(self, tenant: str) -> TenantText:
        return self._text

    @property
    def store(self) -> Any:
        return SimpleNamespace(config=lambda _: SimpleNamespace(is_encoder_decoder=False))


@pytest.fixture(scope="module", params=sorted(speech.KINDS))
def spoken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A tokenizer of each kind: as transformers has it, and as the server does."""
    path = tmp_path_factory.mktemp(request.param)
    speech.KINDS[request.param]().save_pretrained(path)
    return SimpleNamespace(
        kind=request.param, hf=AutoTokenizer.from_pretrained(path), engine=Speaker(path)
    )


def logprobs(ids: list[int], others: Any) -> list[TokenLogprob]:
    """Each token with some that could have been chosen."""
    return [
        TokenLogprob(
            i,
            -0.5,
            ((i, -0.5), *((int(o), -1.0 - n) for n, o in enumerate(others[at]) if o != i)),
            1,
        )
        for at, i in enumerate(ids)
    ]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_tokens_are_what_they_add_to_the_text(
    spoken: SimpleNamespace, prompt: str, answer: str, skip: bool
) -> None:
    hf, engine = spoken.hf, spoken.engine
    before = hf(prompt)["input_ids"]
    ids = hf(prompt + answer, add_special_tokens=True)["input_ids"]
    if ids[: len(before)] != before:
        ids = [*before, *hf(answer, add_special_tokens=False)["input_ids"]]
    mine = ids[len(before) :]
    whole = hf.decode(ids, skip_special_tokens=skip)
    shown = hf.decode(before, skip_special_tokens=skip)
    others = np.random.default_rng(0).integers(0, len(hf), size=(len(mine), 8))
    for texts, found in (
        (TokenTexts(engine, "t", before, skip), logprobs(mine, others)),
        (TokenTexts(engine, "t", before, skip), logprobs(mine, others[:, :0])),
    ):
        parts = [texts.completion([f], last=i == len(found) - 1) for i, f in enumerate(found)]
        tokens = [t for p in parts for t in p.tokens]
        assert shown + "".join(tokens) == whole
        assert [o for p in parts for o in p.text_offset] == [
            len("".join(tokens[:i])) for i in range(len(tokens))
        ]
        for part, token in zip(parts, tokens, strict=True):
            assert part.top_logprobs[0][token] == -0.5
            assert "\ufffd" not in json.dumps(part.top_logprobs, ensure_ascii=False) + token
    chat = TokenTexts(engine, "t", before, skip).chat(logprobs(mine, others), last=True).content
    assert [c.token for c in chat] == tokens
    assert bytes(b for c in chat for b in c.bytes) == "".join(tokens).encode()
    for c in chat:
        assert c.top_logprobs[0].token == c.token and c.top_logprobs[0].bytes == c.bytes
        assert "\ufffd" not in "".join(t.token for t in c.top_logprobs)


def test_bytes_that_are_no_character(spoken: SimpleNamespace) -> None:
    """A token that begins a character adds nothing; as one that was not chosen it is named by its
    bytes."""
    hf = spoken.hf
    if spoken.kind == "word_piece":
        pytest.skip("its tokens are whole characters")
    names = ("<0xE2>", "<0x82>") if spoken.kind == "metaspace" else ("â", "Ĥ")
    first, second = hf.convert_tokens_to_ids(list(names))
    letter = hf.convert_tokens_to_ids("a")
    texts = TokenTexts(spoken.engine, "t", [letter])
    found = texts.completion(
        [TokenLogprob(first, -0.5, ((first, -0.5), (second, -1.0)), 1)], last=False
    )
    assert found.tokens == [""] and found.top_logprobs == [{"": -0.5, "bytes:\\x82": -1.0}]
    # What ends without its last byte has the mark that the answer's text has.
    found = texts.completion(
        [TokenLogprob(second, -0.5, ((first, -2.0), (second, -0.5)), 1)], last=True
    )
    assert found.tokens == [hf.decode([first, second])] == ["\ufffd"] or found.tokens == [
        "\ufffd\ufffd"
    ]
    assert found.top_logprobs[0]["bytes:\\xe2"] == -2.0
    # What breaks off, and goes on with a letter.
    texts = TokenTexts(spoken.engine, "t", [letter])
    chat = texts.chat(
        [TokenLogprob(i, -0.5, ((letter, -1.0),), 2) for i in (first, letter)], last=True
    ).content
    assert [c.bytes for c in chat] == [[0xE2], [ord("a")]] and chat[1].top_logprobs[
        0
    ].token == chat[1].token
    texts = TokenTexts(spoken.engine, "t", [letter])
    other = hf.convert_tokens_to_ids("e")
    chat = texts.chat(
        [TokenLogprob(i, -0.5, ((other, -1.0),), 2) for i in (first, letter)], last=True
    ).content
    assert chat[1].top_logprobs[0].token == "e"


def test_special_tokens_that_were_not_chosen_have_their_names(spoken: SimpleNamespace) -> None:
    hf = spoken.hf
    end, word = hf.convert_tokens_to_ids("<|im_end|>"), hf(" the")["input_ids"][-1]
    found = [TokenLogprob(word, -0.1, ((word, -0.1), (end, -2.0), (hf.eos_token_id, -3.0)), 1)]
    made = TokenTexts(spoken.engine, "t", hf("people")["input_ids"]).completion(found, last=False)
    assert made.top_logprobs[0]["<|im_end|>"] == -2.0 and made.top_logprobs[0]["</s>"] == -3.0


def test_names_of_ids(spoken: SimpleNamespace) -> None:
    ids = spoken.hf(" café there")["input_ids"]
    texts = TokenTexts(spoken.engine, "t", [1], as_ids=True)
    found = texts.completion(logprobs(ids, [[7]] * len(ids)), last=True)
    assert found.tokens == [f"token_id:{i}" for i in ids] and "token_id:7" in found.top_logprobs[0]
    plain = TokenTexts(spoken.engine, "t", [1]).completion(
        logprobs(ids, [[]] * len(ids)), last=True
    )
    assert found.text_offset == plain.text_offset  # of the text, whatever its tokens are called


# Through the server: answers drawn at random, in bytes.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_an_answer_are_its_text(live: Live, loop: Loop, seed: int, stream: bool) -> None:
    body = {
        "model": "ana",
        "prompt": "x",
        "temperature": 3.0,
        "seed": seed,
        "max_tokens": 40,
        "logprobs": 5,
    }
    reply = live.post("/v1/completions", body | {"stream": stream, "n": 2, "ignore_eos": True})
    answers = [json.loads(e) for e in events(reply.text)[:-1]] if stream else [reply.json()]
    for index in range(2):
        choices = [c for a in answers for c in a["choices"] if c["index"] == index]
        tokens = [t for c in choices for t in c["logprobs"]["tokens"]]
        text = "".join(c["text"] for c in choices)
        assert "".join(tokens) == text and len(tokens) == 40
        offsets = [o for c in choices for o in c["logprobs"]["text_offset"]]
        assert offsets == [len("".join(tokens[:i])) for i in range(40)]
        top = json.dumps([c["logprobs"]["top_logprobs"] for c in choices], ensure_ascii=False)
        assert ("\ufffd" in top) <= ("\ufffd" in text) and "bytes:\\\\x" in top


def test_a_better_token_that_reads_alike_is_not_lost(spoken: SimpleNamespace) -> None:
    """lm-eval takes a token for the greedy one if none has a higher log probability."""
    if spoken.kind != "metaspace":
        pytest.skip("no two of its tokens read alike")
    letter, byte = spoken.hf.convert_tokens_to_ids(["e", "<0x65>"])
    found = [TokenLogprob(letter, -0.9, ((byte, -0.4), (letter, -0.9)), 2)]
    texts = TokenTexts(spoken.engine, "t", [letter])
    (top,) = texts.completion(found, last=False).top_logprobs
    assert top == {"e": -0.9, f"token_id:{byte}": -0.4}
