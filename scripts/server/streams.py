"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from scripts.server.errors import SERVER, ApiError, ClientGoneError, from_exception

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def _error_event(error: ApiError) -> bytes:
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come. An error after the first becomes an event too: the status is gone
    by then.

    close: called at the end, however it comes. Starlette's own streaming response would wait for
    the client to go away beside us, which `Run` does already.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], Awaitable[Any]]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                async with aclosing(self._events) as events:
                    async for data in events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            except ClientGoneError:
                raise
            except Exception as error:
                known = from_exception(error)
                if known is None:
                    log.exception("a stream failed")
                    known = ApiError(500, "an error inside the server; its log has it", SERVER)
                await send(
                    {"type": "http.response.body", "body": _error_event(known), "more_body": True}
                )
            await send({"type": "http.response.body", "body": DONE, "more_body": False})
        finally:
            await self._close()
