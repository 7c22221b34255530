"""The client of a server with OpenAI's routes, against a server that streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from common import EngineError
from scripts.load.openai_server import OpenAIServer
from scripts.load.run import Record, run_trace
from scripts.load.traffic import Call, Trace


class Server:
    """As much of OpenAI's completions as the client reads."""

    def __init__(self, chunked: bool = True):
        self.chunked = chunked
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.bodies.append(body)
        if body["model"] == "nobody":
            text = b'{"error": {"message": "no model nobody"}}'
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        else:
            kind = b"transfer-encoding: chunked\r\n" if self.chunked else b""
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + kind + b"\r\n")
            # Two chunks with text, of which the second has two tokens; cut at odd places on the
            # way.
            events = ['{"choices":[{"text":"a"}]}', '{"choices":[{"text":"bc"}]}']
            if body["model"] == "broken":
                events.append('{"error":{"message":"it broke"}}')
            usage = '{"choices":[],"usage":{"completion_tokens":3},"metrics":{"reconfiguration_ms":250}}'  # noqa: E501
            end = [] if body["model"] == "cut" else [usage, "[DONE]"]
            stream = "".join(f"data: {e}\n\n" for e in [*events, *end]).encode()
            for i in range(0, len(stream), 7):
                part = stream[i : i + 7]
                writer.write(b"%x\r\n%s\r\n" % (len(part), part) if self.chunked else part)
                await writer.drain()
            if self.chunked:
                writer.write(b"0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_server_is_tested_over_http(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[Server, list[Record]]:
        async with Server(chunked) as server:
            system = OpenAIServer(server.url + "/v1/", "secret")
            calls = tuple(
                Call(n, t, 0.01 * n, (3, 4), 3)
                for n, t in enumerate(["fr", "nobody", "broken", "cut"])
            )
            records = await run_trace(system, Trace(calls, 0.05), 10.0)
            await system.close()
            return server, records

    server, records = asyncio.run(run())
    assert server.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer secret\r\n" in server.heads[0]
    body = server.bodies[0]
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("fr", [3, 4], 3)
    assert (
        body["stream"] and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    )
    good, unknown, broken, cut = records
    assert good.error is None and good.num_tokens == 3 and len(good.pieces) == 2
    assert good.reconfiguration_s == 0.25
    assert "the server answers 404: no model nobody" in str(unknown.error)
    assert "it broke" in str(broken.error)
    assert "ends before [DONE]" in str(cut.error)


def test_urls_that_lead_nowhere() -> None:
    with pytest.raises(EngineError, match="give one like http://"):
        OpenAIServer("127.0.0.1:8000")
    calls = (Call(0, "a", 0.0, (3,), 1),)
    (record,) = asyncio.run(run_trace(OpenAIServer("http://127.0.0.1:9"), Trace(calls, 0.0), 10.0))
    assert "does the server run?" in str(record.error)
