"""Failures as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, and a
status."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from common.errors import (
    CheckpointError,
    DeadlineError,
    EngineError,
    OverloadedError,
    PlanError,
    RequestError,
    StoreError,
    TenantUnavailableError,
    UnknownTenantError,
)

INVALID = "invalid_request_error"
SERVER = "server_error"
RATE = "rate_limit_error"
LATE = "timeout_error"


class ApiError(Exception):
    """An answer that is an error. param: the request's field at fault. code: a word that programs
    can act on."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = (
            status,
            message,
            kind,
            param,
            code,
        )
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return JSONAnswer(self.body(), self.status, self.headers)


class ClientGoneError(Exception):
    """Whoever asked has closed the connection; nobody reads an answer."""


class JSONAnswer(Response):
    """JSON in ASCII: what a client sent may come back in a message, half a surrogate pair too,
    which is no UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def retry_after(seconds: float) -> dict[str, str]:
    """The header, in whole seconds and at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def unknown_model(model: str) -> ApiError:
    """The same for a tenant that is not there and for one that the key may not use, so that names
    do not leak."""
    return ApiError(
        404,
        f"The model {model!r} does not exist or you may not use it; GET /v1/models lists yours.",
        param="model",
        code="model_not_found",
    )


def from_exception(error: BaseException) -> ApiError | None:
    """What the engine raised, as an answer; None for what it does not raise on purpose."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownTenantError):
        # Its own message lists all tenants, which is not for everybody.
        return ApiError(
            404,
            "The model does not exist; GET /v1/models lists yours.",
            param="model",
            code="model_not_found",
        )
    if isinstance(error, OverloadedError):
        return ApiError(
            429,
            str(error),
            RATE,
            code="overloaded",
            headers=retry_after(error.retry_after_s or 1.0),
        )
    if isinstance(error, DeadlineError):
        # The client set the deadline: nothing broke here. Its library would ask again after a 408,
        # and be late again.
        return ApiError(
            408,
            str(error),
            LATE,
            param="deadline_ms",
            code="deadline_exceeded",
            headers={"x-should-retry": "false"},
        )
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, CheckpointError | StoreError | PlanError):
        return ApiError(500, str(error), SERVER)
    if isinstance(error, TenantUnavailableError):
        # Asking again would not help: somebody has to mend the tenant's files.
        return ApiError(
            503,
            str(error),
            SERVER,
            param="model",
            code="tenant_unavailable",
            headers={"x-should-retry": "false"},
        )
    if isinstance(error, EngineError):
        return ApiError(500, str(error), SERVER, code="engine_error")
    return None
