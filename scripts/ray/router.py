"""Which replica answers a tenant: one with the tenant's weights ready, unless it is overloaded."""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

BEHIND_S = 2.0
"""What replicas say may be so old."""


class TenantRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Ready and free first, then free, then the rest.

    Serve asks the replicas of a rank for their queues, and takes the shortest.
    """

    def initialize_state(self, busy_at: int = 16, **kwargs: Any) -> None:
        """busy_at: requests of a replica from which on it counts as overloaded."""
        self._busy_at = busy_at
        self._sent: dict[ReplicaID, dict[str, float]] = {}
        """When a tenant's request was last sent to a replica; the latest one is last."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        tenant = _tenant(pending_request)
        alive = [r for r in candidate_replicas if not r.routing_stats.get("is_lost")]
        candidate_replicas = alive or candidate_replicas
        free = [r for r in candidate_replicas if not self._is_busy(r)]
        ready = [r for r in free if self._is_ready(r, tenant)]
        others = [r for r in free if r not in ready]
        busy = [r for r in candidate_replicas if r not in free]
        return [rank for rank in (ready, others, busy) if rank]

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: Any = None
    ) -> None:
        """Give the replica to the oldest request of the tenant that it was chosen for.

        `FIFOMixin` gives it to the oldest request of all. `RequestRouter` finds the request by a
        number that all answers of one HTTP request share.
        """
        waiting = [p for p in self._pending_requests_to_fulfill if not p.future.done()]
        chosen = next((p for p in waiting if p.metadata is request_metadata), None)
        for pending in waiting:
            if chosen is not None and _tenant(pending) == _tenant(chosen):
                self._cancel_routing_task_for_pending_request(pending)
                self._record_queue_wait_time(pending)
                pending.future.set_result(replica)
                self._remove_pending_request_from_indices(pending)
                return

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        if (tenant := _tenant(pending_request)) is not None:
            sent = self._sent.setdefault(replica_id, {})
            sent.pop(tenant, None)
            sent[tenant] = time.monotonic()

    def _is_busy(self, replica: RunningReplica) -> bool:
        queue = self.replica_queue_len_cache.get(replica.replica_id) or 0
        stats: dict[str, Any] = replica.routing_stats
        return queue >= self._busy_at or stats.get("waiting", 0) > 0

    def _is_ready(self, replica: RunningReplica, tenant: str | None) -> bool:
        """What the replica said, and what it made ready since: the least recently used go first."""
        stats: dict[str, Any] = replica.routing_stats
        ready = list(stats.get("ready", ()))
        since = time.monotonic() - BEHIND_S
        for name, at in self._sent.get(replica.replica_id, {}).items():
            if at >= since or "ready" not in stats:
                ready = [*(n for n in ready if n != name), name]
        return tenant in ready[-stats.get("max_ready", len(ready)) :]


def _tenant(pending: PendingRequest | None) -> str | None:
    """`EngineReplica.generate`'s first argument."""
    return pending.args[0] if pending is not None and pending.args else None
