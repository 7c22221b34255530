"""A server with OpenAI's routes as a system to load-test: `moetel serve`, vLLM, or any other that
streams completions.

A small client of its own: one connection a request, so that what is measured is the server and not
a pool of connections, and no package is needed.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from common import EngineError
from scripts.load.load_test import Piece
from scripts.load.traffic import Call

MOST_ERROR_BYTES = 4096


class HttpSystem:
    """POST /v1/completions with stream, token ids as the prompt, `model` the tenant."""

    def __init__(self, url: str, api_key: str | None = None):
        """url: http://host:port, or with a path before /v1. Raises EngineError for anything
        else."""
        self.name = "http"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"url {url!r}; give one like http://127.0.0.1:8000")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        """A piece for each chunk."""
        body = json.dumps(
            {
                "model": call.tenant,
                "prompt": list(call.prompt),
                "max_tokens": call.max_new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise EngineError(
                f"no connection to {self._host}:{self._port} ({error}); does the server run?"
            ) from error
        try:
            writer.write(self._head(len(body)) + body)
            await writer.drain()
            status, headers = await _read_head(reader)
            if status != 200:
                raise EngineError(f"the server answers {status}: {await _error(reader, headers)}")
            async for piece in _pieces(reader, headers):
                yield piece
        except (
            OSError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            ValueError,
        ) as error:
            raise EngineError(
                f"the server's answer broke off ({type(error).__name__}: {error})"
            ) from error
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _head(self, length: int) -> bytes:
        return (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: "
            "application/json\r\n"
            f"Accept: text/event-stream\r\n{self._authorization}Content-Length: "
            f"{length}\r\nConnection: close\r\n\r\n"
        ).encode()

    async def about(self) -> dict[str, Any]:
        return {"load_s": 0.0, "url": f"{self._host}:{self._port}"}

    async def close(self) -> None:
        """Nothing is kept open."""


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, their names in small letters."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(head[0].split()[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes]:
    """The body as it comes, without the marks of chunked encoding."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        while data := await reader.read(1 << 16):
            yield data
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _error(reader: asyncio.StreamReader, headers: dict[str, str]) -> str:
    data = b""
    async for part in _body(reader, headers):
        data += part
        if len(data) > MOST_ERROR_BYTES or len(data) >= int(
            headers.get("content-length", MOST_ERROR_BYTES)
        ):
            break
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace")


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[Piece]:
    """Events `data: {...}` until `data: [DONE]`."""
    waiting = b""
    async for data in _body(reader, headers):
        waiting += data
        *events, waiting = waiting.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            text = b"".join(
                line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")
            )
            if text == b"[DONE]":
                return
            if not text:
                continue
            chunk = json.loads(text)
            if "error" in chunk:
                raise EngineError(
                    f"the server ends the answer: {chunk['error'].get('message', chunk['error'])}"
                )
            took_s = (chunk.get("metrics") or {}).get("reconfiguration_ms", 0.0) / 1e3
            total = (chunk.get("usage") or {}).get("completion_tokens")
            # A chunk may hold several tokens; only the usage says how many there were.
            yield Piece(1 if chunk.get("choices") else 0, took_s, total)
    raise EngineError("the server's answer ends before [DONE]")
