"""What fields of vLLM's requests do to prompts and answers, beside transformers' tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from scripts.server.settings import ServerSettings
from tests.server.live import Live, Loop, error
from tests.server.speaking import CHAT, COMPLETION, chat, complete

# What is supported has effect.


def test_special_tokens_of_answers(words: Live, hf: Any) -> None:
    end = hf.convert_tokens_to_ids("<|im_end|>")
    bias = {"logit_bias": {str(end): 100}, "logprobs": 1, "max_tokens": 2}
    assert complete(words, **bias)["text"] == ""
    shown = complete(words, **bias, skip_special_tokens=False)
    assert shown["text"] == "<|im_end|>" * 2 and shown["logprobs"]["tokens"] == ["<|im_end|>"] * 2
    bias["logprobs"] = True
    message = chat(words, **bias, skip_special_tokens=False)["choices"][0]
    assert message["message"]["content"] == "<|im_end|>" * 2
    assert [t["token"] for t in message["logprobs"]["content"]] == ["<|im_end|>"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_as_stop_string(words: Live, hf: Any, stream: bool) -> None:
    end = hf.convert_tokens_to_ids("<|im_end|>")
    body = COMPLETION | {"logit_bias": {str(end): 100}, "max_tokens": 8, "n": 2, "stream": stream}
    for stop in ("<|im_end|>", ["x", "<|im_end|>"]):
        reply = words.post("/v1/completions", body | {"stop": stop})
        answers = (
            [json.loads(e[6:]) for e in reply.text.split("\n\n")[:-2]] if stream else [reply.json()]
        )
        ended = [c for a in answers for c in a["choices"] if c["finish_reason"]]
        assert sorted(c["index"] for c in ended) == [0, 1]
        assert all((c["finish_reason"], c["stop_reason"]) == ("stop", "<|im_end|>") for c in ended)
    found = error(words.post("/v1/completions", body | {"stop": ["<|im_end|>\n"]}), 400)
    assert "skip_special_tokens" in found["message"]


def test_stop_strings_that_stay(words: Live, hf: Any) -> None:
    word = hf(" there", add_special_tokens=False)["input_ids"][-1]
    ask = {"logit_bias": {str(word): 100}, "max_tokens": 6, "stop": ["th"]}
    assert complete(words, **ask)["text"] == " "
    assert complete(words, **ask, include_stop_str_in_output=True)["text"] == " th"


def test_prompts_with_and_without_special_tokens(words: Live, hf: Any) -> None:
    assert complete(words)["prompt_token_ids"] == hf("the people")["input_ids"]
    plain = hf("the people", add_special_tokens=False)["input_ids"]
    assert complete(words, add_special_tokens=False)["prompt_token_ids"] == plain
    for special in (True, False):
        ids = words.post(
            "/tokenize", {"model": "words", "prompt": "the people", "add_special_tokens": special}
        ).json()
        assert ids["tokens"] == hf("the people", add_special_tokens=special)["input_ids"]
    rendered = hf.apply_chat_template(CHAT["messages"], tokenize=False, add_generation_prompt=True)
    for special in (True, False):
        want = hf(rendered, add_special_tokens=special)["input_ids"]
        assert chat(words, add_special_tokens=special)["prompt_token_ids"] == want
        body = {"model": "words", "messages": CHAT["messages"], "add_special_tokens": special}
        assert words.post("/tokenize", body | {"return_token_strs": True}).json() == {
            "count": len(want),
            "max_model_len": 256,
            "tokens": want,
            "token_strs": hf.convert_ids_to_tokens(want),
        }


def test_an_empty_prompt_begins_a_text(words: Live, hf: Any) -> None:
    assert complete(words, prompt="")["prompt_token_ids"] == [hf.bos_token_id]
    assert complete(words, prompt="", echo=True)["text"] == complete(words, prompt="")["text"]
    found = error(
        words.post("/v1/completions", COMPLETION | {"prompt": "", "add_special_tokens": False}), 400
    )
    assert found["param"] == "prompt"


def test_prompts_are_cut(words: Live, hf: Any) -> None:
    text = "the people could find some words"
    ids = hf(text)["input_ids"]
    bos, plain = ids[:1], ids[1:]
    assert (
        complete(words, prompt=text, truncate_prompt_tokens=3)["prompt_token_ids"]
        == bos + plain[-2:]
    )
    cut = {"truncate_prompt_tokens": 3, "truncation_side": "right"}
    assert complete(words, prompt=text, **cut)["prompt_token_ids"] == bos + plain[:2]
    assert complete(words, prompt=plain, truncate_prompt_tokens=2)["prompt_token_ids"] == plain[-2:]
    assert complete(words, prompt=text, truncate_prompt_tokens=200)["prompt_token_ids"] == ids
    shown = complete(words, prompt=text, truncate_prompt_tokens=3, echo=True)["text"]
    assert shown == hf.decode(plain[-2:]) + complete(words, prompt=bos + plain[-2:])["text"]
    # -1 leaves room for the answer, and for one token where it asks for more than there is.
    for most, kept in ((3, 253), (1000, 255)):
        found = complete(words, prompt=[5] * 300, truncate_prompt_tokens=-1, max_tokens=most)
        assert len(found["prompt_token_ids"]) == kept
    assert len(chat(words, truncate_prompt_tokens=4)["prompt_token_ids"]) == 4
    for wrong in (-2, 257, "3"):
        reply = words.post("/v1/completions", COMPLETION | {"truncate_prompt_tokens": wrong})
        assert error(reply, 400)["param"] == "truncate_prompt_tokens"


def test_echo_is_what_the_tokens_say(words: Live, hf: Any) -> None:
    ids = hf("the people caf")["input_ids"]
    e, acute = hf.convert_tokens_to_ids(["<0xC3>", "<0xA9>"])
    # The prompt begins a character that the answer ends.
    found = complete(words, prompt=[*ids, e], echo=True, logit_bias={str(acute): 100}, max_tokens=1)
    assert (
        found["text"] == hf.decode([*ids, e, acute], skip_special_tokens=True) == "the people café"
    )
    special = complete(words, prompt=ids, echo=True, skip_special_tokens=False)["text"]
    assert special.startswith("<s>")


def test_ids_instead_of_tokens(words: Live) -> None:
    found = complete(words, logprobs=2, return_tokens_as_token_ids=True)
    assert found["logprobs"]["tokens"] == [f"token_id:{i}" for i in found["token_ids"]]
    answer = chat(words, logprobs=True, return_tokens_as_token_ids=True)["choices"][0]
    assert [t["token"] for t in answer["logprobs"]["content"]] == [
        f"token_id:{i}" for i in answer["token_ids"]
    ]


def test_the_answers_id(words: Live) -> None:
    reply = words.post("/v1/completions", COMPLETION | {"request_id": "mine"})
    assert reply.json()["id"] == "cmpl-mine"


# Conversations.


def test_where_a_conversation_ends(words: Live, hf: Any) -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": "some words"}]

    def want(**options: Any) -> list[int]:
        text = hf.apply_chat_template(turns, tokenize=False, **options)
        found: list[int] = hf(text, add_special_tokens=False)["input_ids"]
        return found

    for fields, options in (
        ({}, {"add_generation_prompt": True}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            {"continue_final_message": True},
        ),
    ):
        found = chat(words, messages=turns, return_prompt_text=True, **fields)
        assert found["prompt_token_ids"] == want(**options)
        assert found["prompt_text"] == hf.apply_chat_template(turns, tokenize=False, **options)
        ids = words.post("/tokenize", {"model": "words", "messages": turns, **fields}).json()[
            "tokens"
        ]
        assert ids == want(**options)
    unbegun = {"messages": turns, "add_generation_prompt": False}
    ids = words.post("/tokenize", {"model": "words", **unbegun}).json()["tokens"]
    assert ids == want(add_generation_prompt=False)
    assert (
        error(words.post("/v1/chat/completions", CHAT | unbegun), 400)["param"]
        == "add_generation_prompt"
    )
    both = CHAT | {"continue_final_message": True, "add_generation_prompt": True}
    assert error(words.post("/v1/chat/completions", both), 400)["param"] == "add_generation_prompt"


def test_variables_of_templates(words: Live, paths: dict[str, Path]) -> None:
    hf = AutoTokenizer.from_pretrained(paths["docs"])
    documents = [{"title": "the", "text": "people"}]
    for fields, options in (
        ({"documents": documents}, {"documents": documents}),
        ({"chat_template_kwargs": {"mood": "words"}}, {"mood": "words"}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    ):
        want = hf.apply_chat_template(
            CHAT["messages"], tokenize=False, add_generation_prompt=True, **options
        )
        assert chat(words, model="docs", return_prompt_text=True, **fields)["prompt_text"] == want
    # What this template does not read would change nothing.
    for fields in (
        {"documents": documents},
        {"chat_template_kwargs": {"mood": "words"}},
        {"reasoning_effort": "low"},
    ):
        (name,) = fields
        assert error(words.post("/v1/chat/completions", CHAT | fields), 400)["param"] == name
        assert error(
            words.post("/tokenize", {"model": "words", "messages": CHAT["messages"], **fields}), 400
        )
    for name in ("tokenize", "chat_template", "messages", "add_generation_prompt"):
        reply = words.post(
            "/v1/chat/completions", CHAT | {"model": "docs", "chat_template_kwargs": {name: True}}
        )
        assert error(reply, 400)["param"] == "chat_template_kwargs"
    assert chat(words, documents=[], chat_template_kwargs={}, reasoning_effort="none")


# Defaults of the tenant.


def test_a_generation_config_gives_defaults(words: Live, speaking: Loop) -> None:
    ask = {"model": "warm", "max_tokens": 20, "ignore_eos": True}
    body = {k: v for k, v in (COMPLETION | ask).items() if k != "temperature"}
    found = [
        words.post("/v1/completions", body).json()["choices"][0]["token_ids"] for _ in range(3)
    ]
    assert (
        len(found[0]) == 5 and found[0] == found[1] == found[2]
    )  # top_k 1 is greedy; at most 5 tokens
    greedy = words.post("/v1/completions", body | {"temperature": 0}).json()["choices"][0][
        "token_ids"
    ]
    assert greedy == found[0]
    drawn = [
        tuple(
            words.post(
                "/v1/completions", body | {"top_k": 0, "temperature": 5.0, "seed": s}
            ).json()["choices"][0]["token_ids"]
        )
        for s in range(4)
    ]
    assert len(set(drawn)) > 1
    with speaking.serve(ServerSettings(generation_config=False)) as plain:
        counts = {
            len(plain.post("/v1/completions", body).json()["choices"][0]["token_ids"])
            for _ in range(2)
        }
        assert counts == {20}
