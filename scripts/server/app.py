"""The FastAPI application over an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from common.errors import MoetelError
from common.version import __version__
from scripts.server import chat, completions, models, operations, responses
from scripts.server.errors import SERVER, ApiError, from_exception
from scripts.server.front import Front
from scripts.server.origins import Origins
from scripts.server.requests import MENDS
from scripts.server.service import Service
from scripts.server.settings import ServerSettings

if TYPE_CHECKING:
    from common.build.online import OnlineEngine

log = logging.getLogger(__name__)


def create_app(async_engine: OnlineEngine | None, settings: ServerSettings) -> FastAPI:
    """The application. Without an engine it says that the store is loaded until
    `app.state.service.attach` is called.

    It does not own the engine: who made it closes it.
    """
    app = FastAPI(
        title="Moetel",
        version=__version__,
        description="Many fine-tuned Mixture-of-Experts models from one set of shared experts, "
        "with OpenAI's routes.",
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    service = app.state.service = Service(settings)
    if async_engine is not None:
        service.attach(async_engine)
    app.add_middleware(Front, service=service)
    if settings.allowed_origins:
        app.add_middleware(
            Origins, settings=settings
        )  # outermost, so that every answer has its headers
    for error, handler in (
        (ApiError, _known),
        (MoetelError, _known),
        (RequestValidationError, _invalid),
        (HTTPException, _http),
    ):
        app.add_exception_handler(error, handler)
    for routes in (models, completions, chat, responses, operations):
        app.include_router(routes.router)
    app.openapi = _without_422(app)  # type: ignore[method-assign]
    return app


# Routes of OpenAI's and vLLM's APIs that no tenant can serve.
ELSEWHERE = {
    "/v1/embeddings": "embeddings are",
    "/v1/pooling": "pooling is",
    "/v1/classify": "classification is",
    "/v1/score": "scores of pairs are",
    "/v1/rerank": "reranking is",
    "/v2/rerank": "reranking is",
    "/v1/moderations": "moderation is",
    "/v1/audio/speech": "speech is",
    "/v1/audio/transcriptions": "transcription is",
    "/v1/audio/translations": "translation of speech is",
    "/v1/images/generations": "making images is",
}


async def _known(request: Request, error: Exception) -> Response:
    found = from_exception(error)
    if found is None:
        raise error
    if (
        found.status >= 500 and request.url.path != "/ready"
    ):  # which says so by its status, again and again
        log.warning("%s %s: %s", request.method, request.url.path, found.message)
    return found.response()


async def _http(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, another method, a body that is no JSON text."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no route {request.method} {request.url.path}; GET /openapi.json lists them"
        if (what := ELSEWHERE.get(request.url.path.rstrip("/"))) is not None:
            message = (
                f"{request.url.path}: {what} not offered, as the tenants are models that answer in "
                "text; ask /v1/chat/completions or /v1/completions"
            )
    elif error.status_code == 405:
        message = (
            f"{request.url.path} does not take {request.method}; GET /openapi.json lists the routes"
        )
    kind = {} if error.status_code < 500 else {"kind": SERVER}
    return ApiError(error.status_code, message, headers=error.headers, **kind).response()


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or has a field of another type."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is no JSON ({first['ctx']['error']} at character {where[-1]})"
        ).response()
    place, path = where[0], where[1:]
    message = str(first["msg"])
    if message.startswith("Value error, "):  # our own, which names its field
        message = message.removeprefix("Value error, ")
        return ApiError(400, message, param=message.partition(":")[0]).response()
    if not path:
        kind = request.headers.get("content-type", "")
        if place == "body" and not kind.partition(";")[0].strip().lower().endswith("json"):
            return ApiError(
                415,
                f"the body is said to be {kind or 'nothing'}; send the header 'Content-Type: "
                "application/json'",
            ).response()
        return ApiError(400, "the body is no JSON object; send {...}").response()
    names = _names(path)
    mend = MENDS.get(names[-1])
    if mend is None or first["type"] == "missing":
        mend = message[:1].lower() + message[1:]
    param = ".".join(names)
    return ApiError(400, f"{param}: {mend}", param=param).response()


def _names(path: list[str]) -> list[str]:
    """Fields and indices alone: after a field of several forms Pydantic names the form as well."""
    for i, part in enumerate(path):
        if part in MENDS:
            return path[: i + 1]
    return [part for part in path if part.isidentifier() or part.isdigit()] or path[:1]


def _without_422(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's own status for invalid requests is never sent: OpenAI's is 400."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        found = made()
        for operations_ in found["paths"].values():
            for operation in operations_.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found.get("components", {}).get("schemas", {}).pop(name, None)
        return found

    return openapi
