"""What FastAPI hands to the routes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from scripts.server.answer_shapes import ErrorAnswer
from scripts.server.front import arrival
from scripts.server.service import Access, Service

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {}},
        "description": "An answer, or a stream of its chunks.",
    }
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": about}
    for status, about in (
        (400, "The request is wrong."),
        (401, "No API key, or an unknown one."),
        (403, "The key may not do this."),
        (404, "No such model."),
        (408, "The body came too slowly, or the request's deadline passed."),
        (413, "The body is too long."),
        (415, "The body is not said to be JSON."),
        (429, "Too many requests; see Retry-After."),
        (500, "An error of the server's."),
        (503, "Loading, or stopping."),
    )
}
"""Any route may answer so."""

# Only so that the OpenAPI page tells of it: `Front` has asked the service before the body was read.
_bearer = HTTPBearer(
    auto_error=False, description="An API key, on a server that was started with --api-keys."
)


async def get_service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


async def get_access(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> Access:
    return arrival(request.scope).access


SharedService = Annotated[Service, Depends(get_service)]
Caller = Annotated[Access, Depends(get_access)]
