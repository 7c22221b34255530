"""Completions and chat: what comes back, and that streams say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.sampling_params import SamplingParams
from scripts.server.answer_shapes import ChatAnswer, ChatChunk, CompletionAnswer
from tests.server.live import Live, Loop, events

GREEDY = {"temperature": 0, "max_tokens": 12}


def ask(live: Live, **fields: Any) -> dict[str, Any]:
    reply = live.post("/v1/completions", {"model": "ana", "prompt": "hello", **GREEDY, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    CompletionAnswer.model_validate(found, strict=True)
    return found


def chunks(live: Live, path: str, **fields: Any) -> list[dict[str, Any]]:
    reply = live.post(path, {"model": "ana", **GREEDY, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *found, last = events(reply.text)
    assert last == "[DONE]"
    return [json.loads(e) for e in found]


def test_a_completion_is_the_engines(live: Live, loop: Loop) -> None:
    found = ask(live, return_token_ids=True)

    async def direct() -> Any:
        async for output in loop.engine.generate("ana", "hello", SamplingParams(max_new_tokens=12)):
            last = output
        return last.generation

    expected = loop.run(direct())
    (choice,) = found["choices"]
    assert choice["text"] == expected.text and choice["token_ids"] == list(expected.token_ids)
    assert choice["prompt_token_ids"] == list(expected.prompt_token_ids)
    assert choice["finish_reason"] == expected.finish_reason == "length"
    assert (
        found["object"] == "text_completion"
        and found["model"] == "ana"
        and found["id"].startswith("cmpl-")
    )
    assert found["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_metrics_of_a_request(live: Live) -> None:
    found = ask(live)["metrics"]
    assert set(found) == {
        *(
            "time_to_first_token_ms",
            "queue_time_ms",
            "generation_time_ms",
            "mean_itl_ms",
            "tokens_per_second",
        ),
        *("reconfiguration_ms", "expert_hits", "expert_misses"),
    }
    assert 0 <= found["queue_time_ms"] <= found["time_to_first_token_ms"]
    assert found["mean_itl_ms"] == pytest.approx(found["generation_time_ms"] / 11, abs=0.01)
    # Each token but the last is read once, by top-2 experts in each of 2 layers.
    assert found["expert_hits"] + found["expert_misses"] == (5 + 11) * 2 * 2
    assert found["expert_misses"] > 0


@pytest.mark.parametrize(
    "fields", [{}, {"n": 3, "temperature": 1.0, "seed": 5}, {"prompt": ["one", "two"], "n": 2}]
)
def test_a_stream_holds_what_a_whole_answer_does(live: Live, fields: dict[str, Any]) -> None:
    whole = ask(live, **fields)
    streamed = {"prompt": "hello", "stream_options": {"include_usage": True}} | fields
    found = chunks(live, "/v1/completions", **streamed)
    last = found.pop()
    assert (
        last["choices"] == []
        and last["usage"] == whole["usage"]
        and "expert_hits" in last["metrics"]
    )
    assert all("usage" not in c for c in found) and len({c["id"] for c in found}) == 1
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in found if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [
            choice["finish_reason"]
        ]
        assert len(mine) == 12  # one for each token, though some hold no text
    for chunk in found:
        CompletionAnswer.model_validate(chunk, strict=True)


def test_a_stream_without_usage_ends_with_the_last_token(live: Live) -> None:
    assert all(c["choices"] for c in chunks(live, "/v1/completions", prompt="hello"))


@pytest.mark.parametrize(
    "prompt, tokens",
    [("ab", [2]), (["ab", "abc"], [2, 3]), ([70, 71, 72, 73], [4]), ([[70], [71, 72]], [1, 2])],
)
def test_prompts_of_every_form(live: Live, prompt: Any, tokens: list[int]) -> None:
    found = ask(live, prompt=prompt, max_tokens=2, return_token_ids=True)
    assert [c["index"] for c in found["choices"]] == list(range(len(tokens)))
    assert [len(c["prompt_token_ids"]) for c in found["choices"]] == tokens
    assert found["usage"]["prompt_tokens"] == sum(tokens)


def test_n_counts_a_prompt_once_and_draws_differently(live: Live) -> None:
    found = ask(live, n=3, temperature=1.5, seed=1)
    assert [c["index"] for c in found["choices"]] == [0, 1, 2]
    assert len({c["text"] for c in found["choices"]}) == 3
    assert found["usage"]["prompt_tokens"] == 5 and found["usage"]["completion_tokens"] == 36
    again = ask(live, n=3, temperature=1.5, seed=1)
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in found["choices"]]
    assert ask(live, n=3, temperature=1.5, seed=2)["choices"] != found["choices"]


def test_stop_says_why(live: Live) -> None:
    ids = ask(live, return_token_ids=True)["choices"][0]["token_ids"]
    stopped = ask(live, stop_token_ids=[ids[3]])["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == ids[3]
    text = ask(live, max_tokens=64)["choices"][0]["text"]
    letter = next(c for c in text if c.isascii() and c.isprintable())
    stopped = ask(live, max_tokens=64, stop=[letter])["choices"][0]
    assert stopped["stop_reason"] == letter and letter not in stopped["text"]
    assert text.startswith(stopped["text"])


def test_echo_puts_the_prompt_before(live: Live) -> None:
    plain = ask(live)["choices"][0]["text"]
    assert ask(live, echo=True)["choices"][0]["text"] == "hello" + plain
    assert "".join(
        c["choices"][0]["text"] for c in chunks(live, "/v1/completions", prompt="hello", echo=True)
    ) == ("hello" + plain)
    ids = live.post("/tokenize", {"model": "ana", "prompt": "hello"}).json()["tokens"]
    assert ask(live, prompt=ids, echo=True)["choices"][0]["text"] == "hello" + plain


def test_logprobs_of_completions(live: Live) -> None:
    choice = ask(live, logprobs=3)["choices"][0]
    found = choice["logprobs"]
    assert {len(v) for v in found.values()} == {12}
    assert "".join(found["tokens"]) == choice["text"]
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert logprob <= 0 and top[token] == max(top.values())  # greedy
    lengths = [len(t) for t in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(12)]
    streamed = [
        c["choices"][0]["logprobs"]
        for c in chunks(live, "/v1/completions", prompt="hello", logprobs=3)
    ]
    assert [t for s in streamed for t in s["tokens"]] == found["tokens"]
    assert [o for s in streamed for o in s["text_offset"]] == found["text_offset"]


def test_logprobs_of_chat(live: Live) -> None:
    fields = {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 2,
        **GREEDY,
    }
    reply = live.post("/v1/chat/completions", {"model": "bob", **fields})
    choice = reply.json()["choices"][0]
    found = choice["logprobs"]["content"]
    assert len(found) == 12
    for token in found:
        assert (
            len(token["top_logprobs"]) == 2 and len(token["bytes"]) == 1
        )  # a token of this tenant is a byte
        assert token["top_logprobs"][0] == {k: token[k] for k in ("token", "logprob", "bytes")}
    assert "".join(token["token"] for token in found) == choice["message"]["content"]
    assert (
        bytes(b for token in found for b in token["bytes"]).decode(errors="replace")
        == choice["message"]["content"]
    )
    fields["top_logprobs"] = 0
    reply = live.post("/v1/chat/completions", {"model": "bob", **fields})
    assert reply.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_chat_uses_the_tenants_template(live: Live) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        },
        {"role": "assistant", "content": "three"},
    ]
    reply = live.post(
        "/v1/chat/completions",
        {"model": "bob", "messages": messages, "return_token_ids": True, **GREEDY},
    )
    found = reply.json()
    ChatAnswer.model_validate(found, strict=True)
    ids = live.post(
        "/tokenize", {"model": "bob", "prompt": "<user>one\ntwo<user>three<bot>"}
    ).json()["tokens"]
    assert found["prompt_token_ids"] == ids
    completion = ask(live, model="bob", prompt=ids)["choices"][0]["text"]
    assert found["choices"][0]["message"] == {
        "role": "assistant",
        "content": completion,
        "refusal": None,
    }
    assert found["object"] == "chat.completion" and found["usage"]["completion_tokens"] == 12


def test_a_chat_stream_holds_what_a_whole_answer_does(live: Live) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = live.post(
        "/v1/chat/completions", {"model": "bob", "messages": messages, **GREEDY}
    ).json()
    found = chunks(
        live,
        "/v1/chat/completions",
        model="bob",
        messages=messages,
        stream_options={"include_usage": True},
    )
    for chunk in found:
        ChatChunk.model_validate(chunk, strict=True)
    assert found.pop()["usage"] == whole["usage"]
    deltas = [c["choices"][0]["delta"] for c in found]
    assert deltas[0]["role"] == "assistant" and all("role" not in d for d in deltas[1:])
    assert "".join(d["content"] for d in deltas) == whole["choices"][0]["message"]["content"]
    assert found[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_answer_may_fill_the_context(live: Live) -> None:
    body = {
        "model": "bob",
        "messages": [{"role": "user", "content": "x" * 4000}],
        "temperature": 0,
        "ignore_eos": True,
    }
    usage = live.post("/v1/chat/completions", body).json()["usage"]
    assert usage["total_tokens"] == 4096


def test_max_completion_tokens_goes_first(live: Live) -> None:
    body = {
        "model": "bob",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 9,
        "max_completion_tokens": 4,
    }
    assert live.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 4


def test_default_length_of_a_completion(live: Live) -> None:
    reply = live.post("/v1/completions", {"model": "ana", "prompt": "x", "ignore_eos": True})
    assert reply.json()["usage"]["completion_tokens"] == 16


def test_a_tenant_without_a_tokenizer_answers_in_ids(live: Live) -> None:
    found = ask(live, model="ids", prompt=[5, 6, 7], logprobs=1)["choices"][0]
    assert found["text"] == "" and len(found["token_ids"]) == 12
    assert found["logprobs"]["tokens"] == [f"token_id:{i}" for i in found["token_ids"]]


def test_vllms_fields_have_effect(live: Live) -> None:
    plain = ask(live, return_token_ids=True)["choices"][0]["token_ids"]
    biased = ask(live, return_token_ids=True, logit_bias={"65": 100})["choices"][0]["token_ids"]
    assert set(biased) == {65}
    assert (
        ask(live, return_token_ids=True, temperature=1.0, top_k=1)["choices"][0]["token_ids"]
        == plain
    )
    assert (
        ask(live, return_token_ids=True, temperature=1.0, min_p=1.0)["choices"][0]["token_ids"]
        == plain
    )
    penalised = ask(
        live, return_token_ids=True, logit_bias={"65": 5}, repetition_penalty=2.0, max_tokens=40
    )
    assert penalised["choices"][0]["token_ids"] != ask(
        live, return_token_ids=True, logit_bias={"65": 5}, max_tokens=40
    )
    assert ask(live, stop_token_ids=[plain[0]], min_tokens=6)["usage"]["completion_tokens"] >= 6
    assert ask(live, unknown_field={"a": 1}, user="me", parallel_tool_calls=False)["choices"]


def test_models(live: Live) -> None:
    found = live.get("/v1/models").json()
    assert found["object"] == "list" and [m["id"] for m in found["data"]] == ["ana", "bob", "ids"]
    model = found["data"][0]
    assert set(model) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
    assert model["max_model_len"] == 4096 and model["root"] == "ana" and model["parent"] is None
    assert live.get("/v1/models/bob").json() == found["data"][1]
