"""The store: the directory that holds tenants, the plan and its provenance. See
docs/store-format.md."""

from __future__ import annotations

from common.store.manifest import Manifest, Tenant
from common.store.store import Problem, Store

__all__ = [
    "Manifest",
    "Problem",
    "Store",
    "Tenant",
]
