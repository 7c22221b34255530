"""Routes about the server: health, load, metrics, tokens, the tenants' coming and going, the status
page."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import FileResponse, Response

from common.checkpoints import base_of, is_adapter
from common.errors import CheckpointError, PlanError, RequestError, StoreError, UnknownTenantError
from common.version import __version__
from scripts.server.answer_shapes import (
    DetokenizeAnswer,
    Load,
    State,
    TenantChanged,
    TenantLoad,
    TokenizeAnswer,
    Version,
)
from scripts.server.chat_requests import DetokenizeRequest, TokenizeRequest
from scripts.server.conversation import written
from scripts.server.dependencies import ERRORS, Caller, SharedService
from scripts.server.errors import SERVER, ApiError, JSONAnswer, unknown_model
from scripts.server.requests import LoadTenantRequest, UnloadTenantRequest
from scripts.server.service import Service
from scripts.server.status import expert_map, status

log = logging.getLogger(__name__)
router = APIRouter(responses=ERRORS)

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"style.css": "text/css", "script.js": "text/javascript", "icon.svg": "image/svg+xml"}
PAGE_HEADERS = {
    # The page takes nothing from elsewhere, and runs nothing that is not in its own files.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
    "'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/health", response_model_exclude_unset=True)
async def health(service: SharedService) -> State:
    """200 while the engine's thread lives, and while the store is loaded."""
    if service.engine is not None and not service.engine.healthy:
        raise ApiError(
            503, "the engine has stopped; see the server's log", SERVER, code="engine_stopped"
        )
    return State(status="ok")


@router.get("/ready", response_model_exclude_unset=True)
async def ready(service: SharedService, caller: Caller) -> State:
    """200 if requests are taken; 503 while the store is loaded and while the server stops.

    Tenants that cannot be asked do not count: the others are served. They are named, on a server
    with keys to those that may use them.
    """
    service.require()
    service.refuse_if_draining()
    out = State(status="ready")
    unavailable = service.unavailable(caller)
    if unavailable:
        out.unavailable = list(unavailable)
    return out


@router.get("/version")
async def version() -> Version:
    return Version(version=__version__)


@router.get("/load")
async def load(service: SharedService, caller: Caller) -> Load:
    """Requests now, of all and of each tenant that this key may use."""
    found = await service.require().load()
    tenants = {
        name: TenantLoad(running=t.get("running", 0), waiting=t.get("waiting", 0))
        for name in service.visible(caller)
        for t in [found["tenants"].get(name, {})]
    }
    running, waiting = int(found["running"]), int(found["waiting"])
    return Load(server_load=running + waiting, running=running, waiting=waiting, tenants=tenants)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: SharedService, caller: Caller) -> Response:
    """For Prometheus. With keys: an admin key, as they name all tenants."""
    service.require_operator(caller)
    watch = service.watch
    shown = service.metrics.render(
        await service.snapshot(),
        service.tenants,
        service.unavailable(caller),
        (0, 0) if watch is None else (watch.updates, watch.failures),
    )
    return Response(shown, media_type=CONTENT_TYPE_LATEST)


# Tokens.


@router.post("/tokenize", response_model_exclude_unset=True)
async def tokenize(body: TokenizeRequest, service: SharedService, caller: Caller) -> TokenizeAnswer:
    """Token ids of a text, or of a conversation in the tenant's chat template."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    await service.has_tokenizer(tenant)
    ids = await asyncio.to_thread(_tokenized, body, service, tenant)
    out = TokenizeAnswer(count=len(ids), max_model_len=service.max_model_len(tenant), tokens=ids)
    if body.return_token_strs:
        out.token_strs = (
            service.require().engine.text(tenant).require("token ids have no text").tokens(ids)
        )
    return out


def _tokenized(body: TokenizeRequest, service: Service, tenant: str) -> list[int]:
    engine = service.require().engine
    special = body.add_special_tokens
    if body.messages is not None:
        return engine.tokenize(tenant, written(engine, tenant, body), bool(special))
    return engine.tokenize(tenant, body.prompt or "", special is not False)


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, service: SharedService, caller: Caller
) -> DetokenizeAnswer:
    """The text of token ids."""
    tenant = service.resolve(body.model, caller)
    service.count(caller, tenant)
    await service.has_tokenizer(tenant)
    engine = service.require().engine
    size = engine.store.config(tenant).vocab_size
    if any(i >= size for i in body.tokens):
        raise ApiError(
            400, f"tokens: an id lies outside the vocabulary (0..{size - 1})", param="tokens"
        )
    text = await asyncio.to_thread(engine.detokenize, tenant, body.tokens) if body.tokens else ""
    return DetokenizeAnswer(prompt=text)


# Tenants come and go.


@router.post("/v1/load_tenant")
async def load_tenant(
    body: LoadTenantRequest, service: SharedService, caller: Caller
) -> TenantChanged:
    """Add a checkpoint to the store and serve it. With --enable-admin; other tenants go on
    meanwhile."""
    service.require_admin(caller)
    engine = service.require()
    roots = service.settings.tenant_roots
    path = _inside(Path(body.tenant_path), roots)
    try:
        base = None
        if is_adapter(path):  # it may name any directory of this machine
            base = _inside(base_of(path), roots, "the adapter's base")
        await engine.add_tenant(body.tenant_name, path, base=base)
    except (CheckpointError, StoreError, PlanError, RequestError) as error:
        raise ApiError(400, str(error)) from error
    log.info("tenant %s loaded from %s", body.tenant_name, path)
    service.warn_of_unused(body.tenant_name)
    return TenantChanged(tenant_name=body.tenant_name, status="loaded")


def _inside(path: Path, roots: tuple[Path, ...], what: str = "it") -> Path:
    """The path with links followed, if it lies below one of the roots.

    what: the path is, in errors. Raises ApiError.
    """
    try:
        found = path.resolve()
        is_directory = found.is_dir()
    except (OSError, ValueError) as error:  # too long a name, or one with NUL
        raise ApiError(
            400, f"tenant_path: is no path ({error}); give a checkpoint", param="tenant_path"
        ) from error
    if roots and not any(found.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(map(str, roots))
        raise ApiError(
            403,
            f"tenant_path: {what} lies outside {allowed} (--tenant-root); move it there",
            param="tenant_path",
        )
    if not is_directory:
        raise ApiError(
            400,
            "tenant_path: is no directory of the server's; give a checkpoint",
            param="tenant_path",
        )
    return found


@router.post("/v1/unload_tenant")
async def unload_tenant(
    body: UnloadTenantRequest, service: SharedService, caller: Caller
) -> TenantChanged:
    """Remove a tenant when its running requests are done. With --enable-admin."""
    service.require_admin(caller)
    tenant = body.tenant_name
    try:
        await service.require().remove_tenant(tenant)
    except UnknownTenantError as error:
        raise unknown_model(tenant) from error
    except (StoreError, PlanError, RequestError) as error:
        raise ApiError(400, str(error)) from error
    service.forget(tenant)
    log.info("tenant %s unloaded", tenant)
    return TenantChanged(tenant_name=tenant, status="unloaded")


# The status page.


@router.get("/status.json", response_model=dict[str, Any])
async def status_json(
    request: Request,
    service: SharedService,
    caller: Caller,
    tenant: Annotated[
        str | None, Query(max_length=256, description="Whose expert map to send along.")
    ] = None,
) -> Response:
    """What the status page shows, of the tenants that this key may use."""
    found = await status(service, caller)
    if tenant is not None:
        found["map"] = expert_map(service, service.resolve(tenant, caller), caller)
    return JSONAnswer(found, headers={"Cache-Control": "no-store"})


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE / "index.html", media_type="text/html", headers=PAGE_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> FileResponse:
    if name not in PAGE_FILES:
        raise ApiError(404, f"the status page has no file {name!r}")
    return FileResponse(PAGE / name, media_type=PAGE_FILES[name], headers=PAGE_HEADERS)
