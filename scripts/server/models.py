"""`/v1/models`: the tenants that a caller may ask."""

from __future__ import annotations

from fastapi import APIRouter

from scripts.server.answer_shapes import (
    Model,
    ModelList,
)
from scripts.server.dependencies import ERRORS, Caller, SharedService
from scripts.server.service import Service

router = APIRouter(prefix="/v1", responses=ERRORS)


def _model(service: Service, tenant: str) -> Model:
    # The root is the name, not the path that the checkpoint came from, which is nobody's business.
    return Model(
        id=tenant,
        created=service.started_at,
        root=tenant,
        parent=None,
        max_model_len=service.max_model_len(tenant),
    )


@router.get("/models")
async def list_models(service: SharedService, caller: Caller) -> ModelList:
    """The tenants that this key may use."""
    service.require()
    return ModelList(data=[_model(service, name) for name in service.visible(caller)])


@router.get("/models/{model}")
async def get_model(model: str, service: SharedService, caller: Caller) -> Model:
    """One of them."""
    return _model(service, service.resolve(model, caller))
