"""`moetel serve STORE --ray`: Ray Serve on this machine, until a signal comes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from common.store import Store
from scripts.ray.settings import RaySettings
from scripts.server.process import ServeError, bind

APP = "moetel"
SHARE_OF_INGRESS = 0.1  # of a processor, as `build` asks for it

TAKEN = (
    *("backend", "device", "dtype", "kv_cache_bytes", "max_model_len", "max_num_seqs"),
    *("max_queue", "rate_limit", "tool_call_parser", "reasoning_parser", "watch", "replicas"),
)
"""Options of `moetel serve` that are arguments of the application, by the same names."""

ALSO_TAKEN = (
    *("store", "host", "port", "drain_timeout", "log_level", "api_keys", "ray", "command"),
    *("enable_auto_tool_choice", "warm_up"),
)


def application_arguments(
    args: argparse.Namespace, defaults: Callable[[str], Any]
) -> dict[str, Any]:
    """What `moetel.ray:build` is given. defaults: of an option.

    Raises ServeError for an option that has no meaning on Ray.
    """
    for name, value in vars(args).items():
        if name not in (*TAKEN, *ALSO_TAKEN) and value != defaults(name):
            raise ServeError(
                f"--{name.replace('_', '-')} has no effect with --ray; leave one of them out"
            )
    if args.device.startswith("cuda:"):
        raise ServeError("--device: Ray says which GPU a replica has; give cuda")
    found = {name: getattr(args, name) for name in TAKEN if getattr(args, name) is not None}
    if args.dtype == "auto":
        del found["dtype"]
    if args.api_keys is not None:
        found["api_keys"] = str(args.api_keys.resolve())
    return found | {"store": str(args.store.resolve()), "drain_timeout_s": args.drain_timeout}


def serve_locally(arguments: dict[str, Any], host: str, port: int) -> None:
    """Raises ServeError, RequestError; StoreError for a store that cannot be opened."""
    try:
        import ray
        from ray import serve

        from scripts.ray.application import build
    except ImportError as error:
        raise ServeError(f"{error}; run: pip install 'moetel[ray]'") from error
    RaySettings.of(arguments).server()
    names = Store.open(arguments["store"]).tenants
    with bind(host, port) as sock:  # so that a port in use is told at once, and 0 becomes one
        port = sock.getsockname()[1]
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        found = ray.cluster_resources()
        on_gpus = arguments["device"] == "cuda" or (
            arguments["device"] == "auto" and found.get("GPU", 0) > 0
        )
        share = (found.get("CPU", os.cpu_count() or 1) - SHARE_OF_INGRESS) / arguments["replicas"]
        resources = {"num_cpus": max(0.01, min(1.0, share)), "num_gpus": float(on_gpus)}
        serve.run(build(arguments | resources), name=APP, route_prefix="/")
        sys.stdout.write(
            f"moetel serves {len(names)} tenants ({', '.join(names)}) at http://{host}:{port}\n"
        )
        sys.stdout.flush()
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        serve.delete(APP)  # once its answers are whole
    finally:
        serve.shutdown()
        ray.shutdown()
