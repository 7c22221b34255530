"""`build(args)`: the application that Ray Serve runs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from common.serving.scheduler_options import SchedulerOptions
from common.serving.store_watch import StoreWatch
from common.store import Store
from scripts.ray.settings import RaySettings

try:
    from ray import serve
    from ray.serve import Application
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise ImportError(
        f"Ray Serve is not installed ({error}); run: pip install 'moetel[ray]'"
    ) from error


log = logging.getLogger(__name__)

DRAIN_LOOK_S = 0.5
"""Between two looks of a replica that has to go, whether its answers are whole."""


class Ingress:
    """The routes of `moetel serve`, over the replicas' engines."""

    def __init__(self, settings: RaySettings, engines: DeploymentHandle):
        self._settings, self._engines = settings, engines
        self._watching: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        from scripts.ray.remote import RemoteEngine
        from scripts.ray.reports import ReplicaMetrics
        from scripts.server.app import create_app

        options = SchedulerOptions(
            max_num_seqs=self._settings.max_num_seqs,
            max_queue=self._settings.max_queue,
            max_model_len=self._settings.max_model_len,
        )
        engine: Any = RemoteEngine(Store.open(self._settings.store), options, self._engines)
        for name, why in engine.engine.load_texts().items():
            log.error("tenant %s is unavailable: %s", name, why)
        app = create_app(engine, self._settings.server())
        service = app.state.service
        service.metrics.registry.register(ReplicaMetrics(engine.reports, lambda: engine.losses))
        if self._settings.watch:
            service.watch = StoreWatch(engine, service.changed)
            # Serve calls this in the loop that answers.
            self._watching = asyncio.get_running_loop().create_task(service.watch.run())
        return app


def build(args: dict[str, Any]) -> Application:
    """An ingress, and replicas of an engine. args: see `RaySettings`. Raises RequestError."""
    from scripts.ray.replica import EngineReplica
    from scripts.ray.router import TenantRouter

    settings = RaySettings.of(args)
    most = settings.max_num_seqs + settings.max_queue
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.max_num_seqs,
            }
        }
    engines = serve.deployment(
        EngineReplica,
        name="engine",
        # The engine's own queue refuses first, with 429. While there is no replica, so many wait.
        max_ongoing_requests=most + 16,
        max_queued_requests=most * (settings.max_replicas or settings.replicas),
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=TenantRouter,
            request_router_kwargs={"busy_at": settings.max_num_seqs},
            request_routing_stats_period_s=1.0,
        ),
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        **scaling,
    ).bind(settings)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        # The next one takes requests before this one stops.
        max_surge_percent=100,
    )
    app: Application = ingress.bind(settings, engines)
    return app
