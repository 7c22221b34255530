"""What every HTTP request passes first: its number, the bound of its body, the refusal while
stopping, the log.

A middleware of its own and no handler: a body that is too long must be refused while it comes, and
an error that nobody foresaw must still be answered in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.server.errors import SERVER, ApiError, ClientGoneError, retry_after
from scripts.server.keys import Key
from scripts.server.service import Access, Service

log = logging.getLogger(__name__)

SCOPE_KEY = "moetel"
BODY_TIMEOUT_S = 30.0
"""How long a client may take to send a body."""
MAX_BUFFERED = 256 * 2**20
"""Bytes of all bodies that are held at a time."""

# Answered without a key.
OPEN = re.compile(r"/|/(health|ready|version|openapi\.json|page/.*)")
# About the server itself: answered while it stops, and not waited for.
ALWAYS = re.compile(r"/|/(health|ready|version|load|metrics|openapi\.json|status\.json|page/.*)")
NOBODY = Access(Key("nobody", b"", frozenset()))
REQUEST_ID = re.compile(r"[!-~]{1,128}")
# Where a body may hold half a surrogate pair: as an escape, as the bytes that Python's JSON takes
# for one, in UTF-16.
HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")


@dataclass(frozen=True)
class Arrival:
    """A request's number, the client's own if it sent one, when it came (`time.perf_counter`), and
    who sent it."""

    request_id: str
    at: float
    access: Access


def arrival(scope: Scope) -> Arrival:
    found: Arrival = scope[SCOPE_KEY]
    return found


class Front:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = Arrival(_request_id(scope), time.perf_counter(), NOBODY)
        status, method = 0, scope["method"]
        # A route is the same with a slash at its end, and what answers GET answers HEAD.
        path = scope["path"].rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", arrived.request_id.encode()),
                ]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        own = ALWAYS.fullmatch(scope["path"]) is not None
        try:
            # Before the body is read: those without a key are told so whatever they send.
            try:
                arrived = replace(
                    arrived, access=self._service.access(_header(scope, b"authorization"))
                )
            except ApiError:
                if not OPEN.fullmatch(scope["path"]):
                    raise
            scope[SCOPE_KEY] = arrived
            if not own:
                self._service.refuse_if_draining()
                self._service.requests += 1
            try:
                await self._serve(scope, receive, numbered)
            finally:
                self._service.requests -= not own
        except ClientGoneError:
            status = status or 499  # nginx's word for it
        except ApiError as error:
            await error.response()(scope, receive, numbered)
        except Exception:
            log.exception("request %s failed", arrived.request_id)
            if not status:
                failure = ApiError(
                    500,
                    "an error inside the server; its log has it under request "
                    f"{arrived.request_id}",
                    SERVER,
                )
                await failure.response()(scope, receive, numbered)
        finally:
            elapsed_ms = (time.perf_counter() - arrived.at) * 1e3
            level = logging.DEBUG if own else logging.INFO
            log.log(
                level,
                "%s %s %s %.0f ms %s",
                method,
                scope["path"],
                status,
                elapsed_ms,
                arrived.request_id,
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []
        try:
            await self._read(scope, receive, pieces)
            body, told = b"".join(pieces), False
            _refuse_half_pairs(body)

            async def replay() -> Message:
                """The body, once; then what else comes, which is the client closing the
                connection."""
                nonlocal told
                if told:
                    return await receive()
                told = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self._app(scope, replay, send)
        finally:
            self._buffered -= sum(map(len, pieces))

    async def _read(self, scope: Scope, receive: Receive, pieces: list[bytes]) -> None:
        """Read the body, and no more of it than is allowed. Raises ApiError, ClientGoneError."""
        limit = self._service.body_limit
        # Without reading the rest, the connection cannot be used again.
        close = {"Connection": "close"}
        too_long = ApiError(
            413,
            f"the body is longer than {limit} bytes (--max-request-bytes); send less in one "
            "request",
            code="request_too_large",
            headers=close,
        )
        announced = _header(scope, b"content-length") or "0"
        if announced.isdigit() and int(announced) > limit:
            raise too_long
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > limit:
                        raise too_long
                    pieces.append(piece)
                    self._buffered += len(piece)
                    if self._buffered > MAX_BUFFERED:
                        raise ApiError(
                            503,
                            "the server holds too many long bodies; try again later",
                            SERVER,
                            code="overloaded",
                            headers=retry_after(1) | close,
                        )
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {BODY_TIMEOUT_S:.0f} s",
                code="request_timeout",
                headers=close,
            ) from None


def _refuse_half_pairs(body: bytes) -> None:
    """Raises ApiError that names the field for text that is no Unicode, which nothing behind here
    could write out."""
    if HALF.search(body) is None:
        return
    try:
        where = _half_pair(json.loads(body), ())
    except (ValueError, RecursionError):
        return  # it is no JSON, and the routes say so
    if where is not None:
        name = ".".join(where) or "the body"
        raise ApiError(
            400, f"{name}: holds half a surrogate pair; send whole characters", param=name
        )


def _half_pair(value: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Where in JSON data there is one."""
    if isinstance(value, str):
        return path if any("\ud800" <= c <= "\udfff" for c in value) else None
    items: Any = ()
    if isinstance(value, dict):
        if any(_half_pair(key, path) is not None for key in value):
            return path
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    found = (_half_pair(each, (*path, str(key))) for key, each in items)
    return next((where for where in found if where is not None), None)


def _header(scope: Scope, name: bytes) -> str | None:
    for found, value in scope["headers"]:
        if found == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id` if it can stand in a header and a log line, else a new one."""
    text = _header(scope, b"x-request-id") or ""
    return text if REQUEST_ID.fullmatch(text) else f"req-{uuid.uuid4().hex}"
