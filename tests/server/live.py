"""A real server in this process: an event loop in a thread, one engine, and any number of
applications over it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import httpx2
import uvicorn
from fastapi import FastAPI

from common.build.online import OnlineEngine
from common.serving.engine import Engine
from scripts.server.answer_shapes import ErrorAnswer
from scripts.server.app import create_app
from scripts.server.settings import ServerSettings

T = TypeVar("T")


class Loop:
    """An event loop in a thread, with an engine."""

    def __init__(self, engine: Engine):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def make() -> OnlineEngine:
            return OnlineEngine(engine)

        self.engine = self.run(make())

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60) -> T:
        """Run a coroutine in the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def busy(self) -> int:
        """Requests that the engine has."""
        load = self.run(self.engine.load())
        return int(load["running"] + load["waiting"])

    def close(self) -> None:
        self.engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @contextlib.contextmanager
    def serve(self, settings: ServerSettings | None = None, loaded: bool = True) -> Iterator[Live]:
        """Listen at a free port until the context ends."""
        app = create_app(self.engine if loaded else None, settings or ServerSettings())
        sock = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        done = asyncio.run_coroutine_threadsafe(server._serve(sockets=[sock]), self._loop)
        wait_for(lambda: server.started)
        try:
            yield Live(app, f"http://127.0.0.1:{sock.getsockname()[1]}")
        finally:
            server.should_exit = True
            done.result(30)


class Live:
    """A server that listens."""

    def __init__(self, app: FastAPI, url: str):
        self.app, self.url = app, url
        self.client = httpx2.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        return self.client.post(path, json=body, headers=headers)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=headers)


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Fails if it does not become true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def events(text: str) -> list[str]:
    """What the events of a stream hold."""
    assert text.endswith("\n\n")
    found = text.removesuffix("\n\n").split("\n\n")
    assert all(e.startswith("data: ") and "\n" not in e for e in found)
    return [e.removeprefix("data: ") for e in found]


GOOD = {"model": "ana", "prompt": "hello", "temperature": 0, "max_tokens": 4}


def error(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    ErrorAnswer.model_validate(reply.json(), strict=True)
    found: dict[str, Any] = reply.json()["error"]
    return found
