"""The shared core of Moetel. Imports neither jax nor torch."""

from common.build.build import add_tenant, build_store, remove_tenant
from common.build.examples import CalibrationSet
from common.build.extend import extend_store
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
from common.plan.plan import Copy, Plan, plan_all
from common.planning.round_robin import plan_round_robin
from common.sampling_params import SamplingParams
from common.serving.engine import Engine
from common.serving.loading import load_engine
from common.serving.request import Generation, Timings
from common.serving.scheduler_options import SchedulerOptions
from common.store import Store
from common.store.pack import pack_store
from common.structured_outputs import StructuredOutputs
from common.version import __version__

__all__ = [
    "CalibrationSet",
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
    "StructuredOutputs",
    "Timings",
    "UnknownTenantError",
    "__version__",
    "add_tenant",
    "build_store",
    "extend_store",
    "load_engine",
    "pack_store",
    "plan_all",
    "plan_round_robin",
    "remove_tenant",
]
