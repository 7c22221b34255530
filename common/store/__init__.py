"""The store: the directory that holds tenants, the plan and its provenance. See
docs/store-format.md."""

from __future__ import annotations

from common.store.build import add_tenant, build_store, remove_tenant, replan, set_plan
from common.store.extend import extend_store
from common.store.manifest import Manifest, Tenant
from common.store.store import Problem, Store

__all__ = [
    "Manifest",
    "Problem",
    "Store",
    "Tenant",
    "add_tenant",
    "build_store",
    "extend_store",
    "remove_tenant",
    "replan",
    "set_plan",
]
