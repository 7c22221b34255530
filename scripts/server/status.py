"""What the status page shows: numbers of now and of the last minute, and how a tenant's experts are
served."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from common.plan.plan import MERGED, MISS
from common.version import __version__
from scripts.server.metrics import KINDS, residency
from scripts.server.service import Access, Service

OTHER = "another tenant"
"""In place of names that a key may not see."""


async def status(service: Service, access: Access) -> dict[str, Any]:
    """As JSON; of tenants only those that the caller may use."""
    visible = service.visible(access)
    out: dict[str, Any] = {
        "version": __version__,
        "uptime_s": int(time.time()) - service.started_at,
        "state": "draining" if service.draining else "ready" if service.ready else "loading",
        "tenants": [],
        "series": service.window.series(visible),
    }
    engine = service.engine
    snapshot = await service.snapshot()
    if engine is None:
        return out
    if snapshot is None:
        return out | {"state": "stopped"}
    load, stats = snapshot
    store = engine.engine.store
    out |= {
        "family": store.family.name,
        "device": stats.get("device"),
        "dtype": stats.get("dtype"),
        "running": load["running"],
        "waiting": load["waiting"],
        "memory": {
            kind: int(stats.get(name) or load.get(name) or 0) for kind, name in KINDS.items()
        },
        "kv_cache_bytes": load.get("kv_cache_bytes"),
        "separate_bytes": store.bytes_before,
    }
    counts = stats.get("tenants", {})
    unavailable = service.unavailable(access)
    for name in visible:
        now, ever = load["tenants"].get(name, {}), counts.get(name, {})
        out["tenants"].append(
            {
                "name": name,
                "running": now.get("running", 0),
                "waiting": now.get("waiting", 0),
                "resident": residency(stats, name),
                "unavailable": unavailable.get(name),
                "hits": ever.get("hits", 0),
                "misses": ever.get("misses", 0),
                "requests": sum(ever.get("requests", {}).values()),
                **service.window.tenant(name),
            }
        )
    return out


def expert_map(service: Service, tenant: str, access: Access) -> dict[str, Any]:
    """How a tenant's experts are served: for each layer a text with a letter an expert.

    o: its own copy, for it alone; s: a copy of a tenant's own weights that several use; m: a merged
        copy; -: none, it
    misses. residual: 1 where the tenant adds one. owner: index into `owners`, -1 where there is
    none. users: how many tenants the copy serves.
    """
    plan = service.require().engine.plan
    index = plan.tenants.index(tenant)
    serving = plan.serving[index]
    users = np.bincount(plan.serving[plan.serving != MISS], minlength=len(plan.copies))
    residuals = {(r.layer, r.expert) for r in plan.residuals if r.tenant == index}
    kinds, owner, shared, residual = [], [], [], []
    for layer in range(plan.num_layers):
        letters, owners_here, users_here, marks = "", [], [], ""
        for expert in range(plan.num_experts):
            slot = int(serving[layer, expert])
            copy = None if slot == MISS else plan.copies[slot]
            count = 0 if copy is None else int(users[slot])
            if copy is None:
                letters += "-"
            elif copy.owner == MERGED:
                letters += "m"
            else:
                letters += "o" if copy.owner == index and count == 1 else "s"
            owners_here.append(-1 if copy is None or copy.owner == MERGED else copy.owner)
            users_here.append(count)
            marks += "1" if (layer, expert) in residuals else "0"
        kinds.append(letters)
        owner.append(owners_here)
        shared.append(users_here)
        residual.append(marks)
    return {
        "tenant": tenant,
        "layers": plan.num_layers,
        "experts": plan.num_experts,
        "kinds": kinds,
        "residual": residual,
        "owner": owner,
        "users": shared,
        "owners": [name if access.allows(name) else OTHER for name in plan.tenants],
    }
