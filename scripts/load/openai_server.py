"""A server with OpenAI's routes as a system to load-test: `moetel serve`, vLLM, or any other that
streams completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from common import EngineError
from scripts.load.run import Piece
from scripts.load.traffic import Call

try:
    import httpx2
except ImportError as error:
    raise EngineError(f"--url needs httpx2 ({error}); run: pip install 'moetel[bench]'") from error


class OpenAIServer:
    """POST /v1/completions with stream, token ids as the prompt, `model` the tenant.

    Each request has a connection of its own, so that the server is measured and not a pool.
    """

    def __init__(self, url: str, api_key: str | None = None):
        """url: http://host:port, or with a path before /v1. Raises EngineError for anything
        else."""
        self.name = "http"
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise EngineError(f"url {url!r}; give one like http://127.0.0.1:8000")
        self._url = str(parsed).rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._at = f"{parsed.host}:{parsed.port or (443 if parsed.scheme == 'https' else 80)}"
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=None,
            trust_env=False,
        )

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        """A piece for each chunk."""
        body = {
            "model": call.tenant,
            "prompt": list(call.prompt),
            "max_tokens": call.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code != 200:
                    text = _message(await response.aread())
                    raise EngineError(f"the server answers {response.status_code}: {text}")
                async for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        return
                    yield _piece(json.loads(event.data))
        except httpx2.ConnectError as error:
            raise EngineError(
                f"no connection to {self._at} ({error}); does the server run?"
            ) from error
        except (httpx2.HTTPError, ValueError) as error:
            raise EngineError(
                f"the server's answer broke off ({type(error).__name__}: {error})"
            ) from error
        raise EngineError("the server's answer ends before [DONE]")

    async def about(self) -> dict[str, Any]:
        return {"load_s": 0.0, "url": self._at}

    async def close(self) -> None:
        await self._client.aclose()


def _message(data: bytes) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace")


def _piece(chunk: dict[str, Any]) -> Piece:
    if "error" in chunk:
        raise EngineError(
            f"the server ends the answer: {chunk['error'].get('message', chunk['error'])}"
        )
    took_s = (chunk.get("metrics") or {}).get("reconfiguration_ms", 0.0) / 1e3
    total = (chunk.get("usage") or {}).get("completion_tokens")
    # A chunk may hold several tokens; only the usage says how many there were.
    return Piece(1 if chunk.get("choices") else 0, took_s, total)
