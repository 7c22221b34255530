"""What pages of other origins may ask (CORS), as vLLM lets them: Starlette's middleware, but never
for changes."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from scripts.server.settings import ServerSettings

CLOSED = ("/v1/load_tenant", "/v1/unload_tenant")
"""A page that somebody happens to open must not change a server that they can reach."""


class Origins(CORSMiddleware):
    """ASGI middleware. It answers a browser's preflight, which has no key."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        super().__init__(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            expose_headers=("x-request-id", "retry-after", "x-should-retry"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") in CLOSED:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)
