"""Every field of OpenAI's and vLLM's requests: supported, refused by name, or without meaning
here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai.types
import openai.types.chat
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from transformers import AutoTokenizer

from common import build_store, load_engine
from scripts.server.chat_requests import (
    ChatRequest,
    Conversation,
    DetokenizeRequest,
    TokenizeRequest,
)
from scripts.server.fields import MEANINGLESS, Refused
from scripts.server.requests import CompletionRequest, StreamOptions, Taken
from scripts.server.settings import Settings
from tests import helpers
from tests.server import speech
from tests.server.live import Live, Loop
from tests.server.test_serve_errors import error

MODELS: Mapping[str, type[Taken]] = {
    "CompletionRequest": CompletionRequest,
    "ChatCompletionRequest": ChatRequest,
    "StreamOptions": StreamOptions,
    "TokenizeCompletionRequest": TokenizeRequest,
    "TokenizeChatRequest": TokenizeRequest,
    "DetokenizeRequest": DetokenizeRequest,
}


def _fields() -> Iterator[tuple[str, str, str]]:
    """(whose schema, its class, the field)."""
    data = json.loads((helpers.DATA / "request_fields.json").read_text(encoding="utf-8"))
    for whose, classes in data.items():
        for name, fields in classes.items():
            if name != "source":
                yield from ((whose, name, field) for field in fields)
    # The package may be newer than the list.
    installed = {
        "CompletionRequest": openai.types.completion_create_params.CompletionCreateParamsStreaming,
        "ChatCompletionRequest": chat_params.CompletionCreateParamsStreaming,
        "StreamOptions": ChatCompletionStreamOptionsParam,
    }
    for name, params in installed.items():
        yield from (("openai, installed", name, field) for field in params.__annotations__)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_field_is_decided(name: str) -> None:
    model = MODELS[name]
    listed = {field for _, n, field in _fields() if n == name}
    assert len(listed) >= 2
    for field in listed:
        places = [field in model.model_fields, field in model.refused, field in MEANINGLESS]
        assert sum(places) == 1, (
            f"{name}.{field} is in {sum(places)} of: supported, refused, meaningless"
        )


def test_what_is_refused_is_of_a_schema() -> None:
    """No name is kept that nobody sends."""
    listed = {field for _, _, field in _fields()}
    for model in MODELS.values():
        assert set(model.refused) <= listed
    assert set(MEANINGLESS) <= listed


def test_neutral_values() -> None:
    assert (
        not Refused("").applies(None)
        and not Refused("").applies([])
        and not Refused("").applies(False)
    )
    assert Refused("").applies(0) and Refused("").applies(True) and Refused("", (True,)).applies(1)
    assert not Refused("", (1,)).applies(1.0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tenants whose tokenizers add <s>; `docs` reads documents and variables, `warm` has a
    generation config."""
    root = tmp_path_factory.mktemp("speakers")
    base = helpers.random_mixtral(3, vocab_size=speech.VOCAB, max_position_embeddings=256)
    found = {}
    documents = (
        "{% for d in documents or [] %}[{{ d.title }}]{% endfor %}{{ mood }}{{ reasoning_effort }}"
        + speech.CHATML
    )
    for seed, (name, template) in enumerate(
        {"words": speech.CHATML, "docs": documents, "warm": speech.CHATML}.items()
    ):
        found[name] = helpers.save(helpers.tuned(base, seed), root / name)
        speech.metaspace(template).save_pretrained(found[name])
    config = json.loads((found["warm"] / "generation_config.json").read_text())
    config |= {
        "temperature": 0.5,
        "top_k": 1,
        "max_new_tokens": 5,
        "num_beams": 4,
        "do_sample": True,
    }
    (found["warm"] / "generation_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def speaking(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    store = tmp_path_factory.mktemp("speaking") / "store"
    build_store(store, paths)
    loop = Loop(load_engine(store, device="cpu"))
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def words(speaking: Loop) -> Iterator[Live]:
    with speaking.serve() as live:
        yield live


@pytest.fixture(scope="module")
def hf(paths: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(paths["words"])


COMPLETION = {
    "model": "words",
    "prompt": "the people",
    "max_tokens": 3,
    "temperature": 0,
    "return_token_ids": True,
}
CHAT = {
    "model": "words",
    "messages": [{"role": "user", "content": "the people"}],
    "max_tokens": 3,
    "temperature": 0,
    "return_token_ids": True,
}


def complete(live: Live, **fields: Any) -> dict[str, Any]:
    reply = live.post("/v1/completions", COMPLETION | fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    return found


def chat(live: Live, **fields: Any) -> dict[str, Any]:
    reply = live.post("/v1/chat/completions", CHAT | fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


# A value that changes something, where one that fits all does not.
VALUES: Mapping[str, Any] = {
    "length_penalty": 2.0,
    "thinking_token_budget": 5,
    "stream_interval": 4,
    "prompt_logprobs": 0,
    "spaces_between_special_tokens": False,
    "include_reasoning": False,
    "add_generation_prompt": False,
    "modalities": ["text", "audio"],
    "response_format": {"type": "json_object"},
}


@pytest.mark.parametrize(
    "path, body, model",
    [
        ("/v1/completions", COMPLETION, CompletionRequest),
        ("/v1/chat/completions", CHAT, ChatRequest),
        ("/tokenize", {"model": "words", "messages": CHAT["messages"]}, TokenizeRequest),
    ],
)
def test_what_is_refused_and_what_passes(
    words: Live, path: str, body: dict[str, Any], model: type[Taken]
) -> None:
    for name, refused in model.refused.items():
        found = error(words.post(path, body | {name: VALUES.get(name, ["x"])}), 400)
        assert found["param"] == name and refused.why in found["message"]
    # Values that change nothing: all fields at once, for each has several.
    for i in range(max(len(r.neutral) for r in model.refused.values()) + 1):
        values = {n: (None, *r.neutral)[min(i, len(r.neutral))] for n, r in model.refused.items()}
        reply = words.post(path, body | values | {"max_tokens": 1})
        assert reply.status_code == 200, reply.text
    if path == "/tokenize":
        return
    whole = words.post(path, body).json()["choices"]
    assert (
        words.post(path, body | {name: {"any": ["thing"]} for name in MEANINGLESS}).json()[
            "choices"
        ]
        == whole
    )
    for options in ({"continuous_usage_stats": True}, {"continuous_usage_stats": "x"}):
        reply = words.post(path, body | {"stream": True, "stream_options": options})
        assert error(reply, 400)["param"] == "stream_options.continuous_usage_stats"
    assert words.post(
        path,
        body
        | {
            "stream": True,
            "stream_options": {"continuous_usage_stats": False, "include_obfuscation": True},
        },
    ).text.endswith("[DONE]\n\n")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_tools_that_must_be_called_are_refused(words: Live, choice: Any) -> None:
    assert (
        error(words.post("/v1/chat/completions", CHAT | {"tool_choice": choice}), 400)["param"]
        == "tool_choice"
    )
    assert error(words.post("/v1/chat/completions", CHAT | {"function_call": {"name": "f"}}), 400)


def test_fields_of_the_other_route(words: Live) -> None:
    found = error(words.post("/v1/completions", COMPLETION | {"max_completion_tokens": 5}), 400)
    assert "/v1/chat/completions" in found["message"]
    assert (
        "/v1/completions"
        in error(words.post("/v1/chat/completions", CHAT | {"echo": True}), 400)["message"]
    )
    found = error(
        words.post("/tokenize", {"model": "words", "prompt": "x", "add_generation_prompt": True}),
        400,
    )
    assert found["param"] == "add_generation_prompt"


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
    with speaking.serve(Settings(generation_config=False)) as plain:
        counts = {
            len(plain.post("/v1/completions", body).json()["choices"][0]["token_ids"])
            for _ in range(2)
        }
        assert counts == {20}


def test_unused_settings_are_logged(words: Live, caplog: pytest.LogCaptureFixture) -> None:
    words.app.state.service.warn_of_unused("warm")
    words.app.state.service.warn_of_unused("words")
    (said,) = [r.message for r in caplog.records if "not applied" in r.message]
    assert said.startswith("tenant warm: ") and "num_beams" in said


# The documentation.


def test_the_documentation_names_every_field() -> None:
    text = (helpers.REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    names = {
        n for m in (CompletionRequest, ChatRequest, StreamOptions, Conversation) for n in m.refused
    }
    names |= {n for m in (CompletionRequest, ChatRequest, TokenizeRequest) for n in m.model_fields}
    missing = sorted(n for n in names | set(MEANINGLESS) if f"`{n}`" not in text)
    assert not missing
