"""The shared core of Moetel. Imports neither jax nor torch."""

from common.consolidation import Copy, Plan, plan_all, plan_round_robin
from common.engine import Engine, Generation, Timings, load_engine
from common.errors import (
    CheckpointError,
    DeadlineError,
    EngineError,
    MoetelError,
    OverloadedError,
    PlanError,
    RequestError,
    StoreError,
    UnknownTenantError,
)
from common.sampling import SamplingParams
from common.scheduler import SchedulerOptions
from common.store import Store, add_tenant, build_store, extend_store, remove_tenant
from common.version import __version__

__all__ = [
    "CheckpointError",
    "Copy",
    "DeadlineError",
    "Engine",
    "EngineError",
    "Generation",
    "MoetelError",
    "OverloadedError",
    "Plan",
    "PlanError",
    "RequestError",
    "SamplingParams",
    "SchedulerOptions",
    "Store",
    "StoreError",
    "Timings",
    "UnknownTenantError",
    "__version__",
    "add_tenant",
    "build_store",
    "extend_store",
    "load_engine",
    "plan_all",
    "plan_round_robin",
    "remove_tenant",
]
