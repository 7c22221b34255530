"""LiteLLM, LangChain and OpenAI's client for Node, as their users write it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import load_engine
from scripts.server.settings import ServerSettings
from tests.byte_tokenizer import byte_tokenizer
from tests.server.live import Live, Loop
from tests.server.scripted import tenants_of

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

TEMPLATE = (
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
PLACE: dict[str, Any] = {
    "title": "Place",
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": PLACE},
}
# A random model would put blanks between JSON's tokens for long, and LiteLLM leaves
# additionalProperties out, so objects would have members without end.
SHORT_JSON = {
    **dict.fromkeys(map(str, byte_tokenizer([])(" \n\r\t")["input_ids"]), -100),
    str(byte_tokenizer([])("}")["input_ids"][0]): 100,
}
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("clients")
    store = tenants_of(root, dict.fromkeys(("ana", "bob"), TEMPLATE))
    loop = Loop(load_engine(store, device="cpu"))
    with loop.serve(ServerSettings(tool_call_parser="hermes")) as found:
        yield found
    loop.close()


@pytest.fixture
def expected(live: Live) -> str:
    body = {"model": "ana", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    text: str = live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert len(text) > 3
    return text


def test_litellm(live: Live, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm", reason="pip install 'moetel[clients]'")
    place: dict[str, Any] = {"api_base": f"{live.url}/v1", "api_key": "none", "num_retries": 0}
    for model in ("hosted_vllm/ana", "openai/ana"):
        ask = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **place}
        whole = litellm.completion(**ask)
        assert whole.choices[0].message.content == expected
        assert whole.usage.completion_tokens == 12
        pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**ask, stream=True)]
        assert "".join(pieces) == expected
        called = litellm.completion(
            **ask | {"max_tokens": 200, "temperature": 1},
            logit_bias=SHORT_JSON,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(model="openai/nobody", messages=MESSAGES, **place)


def test_langchain(live: Live, expected: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="pip install 'moetel[clients]'")
    place: dict[str, Any] = {"base_url": f"{live.url}/v1", "api_key": "none", "max_retries": 0}
    chat = langchain.ChatOpenAI(model="ana", temperature=0, max_tokens=12, **place)
    answer = chat.invoke("hello")
    assert answer.content == expected and answer.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in chat.stream("hello")) == expected
    assert [a.content for a in chat.batch(["hello", "hello"])] == [expected] * 2
    longer = langchain.ChatOpenAI(
        model="ana", temperature=1, max_tokens=200, logit_bias=SHORT_JSON, **place
    )
    (call,) = longer.bind_tools([WEATHER], tool_choice="weather").invoke("hello").tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Oslo", "Rome")
    place_of = longer.with_structured_output(PLACE, method="json_schema").invoke("hello")
    assert place_of["city"] in ("Oslo", "Rome")
    items = langchain.ChatOpenAI(
        model="ana", temperature=0, max_tokens=12, use_responses_api=True, **place
    )
    assert items.invoke("hello").text == expected


@pytest.mark.slow
def test_openai_for_node(live: Live, expected: str, tmp_path: Path) -> None:
    if shutil.which("npm") is None or os.environ.get("CI") != "true":
        pytest.skip("it installs a package; have npm, and set CI=true")
    install = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "openai"]
    try:
        subprocess.run(install, cwd=tmp_path, capture_output=True, check=True, timeout=120)
    except subprocess.SubprocessError as error:
        pytest.skip(f"npm cannot be asked: {error}")
    (tmp_path / "ask.mjs").write_text(
        """
        import OpenAI from "openai";
        const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
        const ask = { model: "ana", messages: [{ role: "user", content: "hello" }],
                      temperature: 0, max_tokens: 12 };
        const whole = await client.chat.completions.create(ask);
        let pieces = "";
        for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
          pieces += chunk.choices[0]?.delta?.content ?? "";
        const items = await client.responses.create(
          { model: "ana", input: "hello", temperature: 0, max_output_tokens: 12 });
        let status = 200;
        try { await client.chat.completions.create({ ...ask, model: "nobody" }); }
        catch (error) { status = error.status; }
        console.log(JSON.stringify(
          [whole.choices[0].message.content, pieces, items.output_text, status]));
        """
    )
    run = subprocess.run(
        ["node", "ask.mjs", f"{live.url}/v1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [expected, expected, expected, 404]
