"""Serve a store's tenants over HTTP, with OpenAI's routes: `moetel serve STORE`.

A request's `model` is the tenant. SIGTERM and SIGINT end the server when the running requests are
done.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from common import Store, add_tenant, load_engine
from common.serving.scheduler_options import SchedulerOptions
from scripts import arguments
from scripts.server.keys import KeyRing
from scripts.server.process import ServeError, bind, serve
from scripts.server.reasoning import FORMATS
from scripts.server.settings import ServerSettings
from scripts.server.tools import PARSERS

if TYPE_CHECKING:
    from common.serving.engine import Engine

log = logging.getLogger(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    engine = SchedulerOptions()
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    net = parser.add_argument_group("network")
    net.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine alone)"
    )
    net.add_argument(
        "--port",
        type=arguments.port,
        default=8000,
        metavar="N",
        help="0 takes a free one and prints it",
    )
    net.add_argument(
        "--timeout-keep-alive",
        type=arguments.whole,
        default=5,
        metavar="S",
        help="close idle connections after so many seconds",
    )
    net.add_argument(
        "--drain-timeout",
        type=arguments.seconds,
        default=30.0,
        metavar="S",
        help="on SIGTERM, how long running requests may go on",
    )
    net.add_argument(
        "--max-request-bytes",
        type=arguments.size,
        metavar="SIZE",
        help="longest body (default: by the context)",
    )
    net.add_argument("--log-level", choices=LOG_LEVELS, default="info")

    scale = parser.add_argument_group("several engines")
    scale.add_argument(
        "--ray",
        action="store_true",
        help="serve with Ray Serve on this machine; options without a meaning there are refused",
    )
    scale.add_argument(
        "--replicas", type=arguments.whole, default=1, metavar="N", help="engines; only with --ray"
    )

    load = parser.add_argument_group("engine")
    load.add_argument("--backend", choices=("auto", "torch", "jax"), default="auto")
    arguments.add_engine_arguments(load)
    load.add_argument(
        "--tenant",
        action="append",
        default=[],
        type=arguments.tenant,
        metavar="NAME=CHECKPOINT",
        help="add this tenant to the store before serving, unless it is in it; repeatable",
    )
    load.add_argument(
        "--kv-cache-bytes",
        type=arguments.size,
        metavar="SIZE",
        help="most memory of all caches, as 4GiB",
    )
    load.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="do not compute the beginning of a prompt again that its tenant has read (default: as "
        "the engine does: torch yes, jax cannot)",
    )
    arguments.add_option(
        load, SchedulerOptions, "max_model_len", "most tokens of prompt and answer together"
    )
    arguments.add_option(load, SchedulerOptions, "max_num_seqs", "sequences a step")
    load.add_argument(
        "--max-num-batched-tokens",
        type=arguments.whole,
        metavar="N",
        help=f"tokens a step (default: {engine.max_num_batched_tokens}, or --max-num-seqs if that "
        "is more)",
    )
    arguments.add_option(
        load,
        SchedulerOptions,
        "prefill_chunk",
        "tokens of prompts in a step in which others answer",
    )

    load.add_argument(
        "--tool-call-parser",
        choices=tuple(PARSERS),
        help="the format in which the models call tools; without it tool_choice auto is refused",
    )
    load.add_argument(
        "--reasoning-parser",
        choices=tuple(FORMATS),
        help="how the models mark what they think before they answer; without it that is part of "
        "the answer",
    )
    load.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="as vLLM has it; needs --tool-call-parser, which does it alone",
    )
    load.add_argument(
        "--generation-config",
        choices=("auto", "vllm"),
        default="auto",
        help="auto: each tenant's generation_config.json gives the defaults for sampling; vllm: "
        "OpenAI's defaults",
    )
    load.add_argument(
        "--watch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve what others make of the store while it is served: moetel add, remove, plan",
    )
    load.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute made-up requests before the first real ones, which would wait for the "
        "compiler",
    )

    share = parser.add_argument_group("sharing among tenants")
    share.add_argument(
        "--tenant-weight",
        action="append",
        default=[],
        type=arguments.named(float),
        metavar="NAME=W",
        help="a tenant's share beside the others', which have 1; repeatable",
    )
    share.add_argument(
        "--tenant-limit",
        action="append",
        default=[],
        type=arguments.named(int),
        metavar="NAME=N",
        help="most sequences of a tenant in a step; repeatable",
    )
    arguments.add_option(
        share,
        SchedulerOptions,
        "default_limit",
        "the same of tenants that are not named (default: as many as are free)",
        "default-tenant-limit",
    )
    arguments.add_option(
        share,
        SchedulerOptions,
        "max_interference",
        "how much longer steps may get by places that a tenant takes beyond its share while "
        "others have requests "
        "(default: %(default)s, a tenth; inf: all free places are taken)",
    )
    arguments.add_option(
        share, SchedulerOptions, "max_queue", "requests that may wait; more get 429"
    )
    arguments.add_option(share, SchedulerOptions, "max_queue_per_tenant", "and of one tenant")

    who = parser.add_argument_group("who may do what")
    who.add_argument(
        "--api-keys",
        type=arguments.path,
        metavar="FILE",
        help="ask for keys; moetel keys new makes them",
    )
    who.add_argument(
        "--rate-limit",
        type=arguments.whole,
        metavar="N",
        help="requests a minute, for each key (without keys: each tenant)",
    )
    who.add_argument(
        "--enable-admin",
        action="store_true",
        help="allow POST /v1/load_tenant and /v1/unload_tenant",
    )
    for what, about in (
        ("origins", "origins whose pages may ask, as a JSON list or one alone; []: none"),
        ("methods", "methods that they may use"),
        ("headers", "headers that they may send"),
    ):
        who.add_argument(
            f"--allowed-{what}",
            type=arguments.texts,
            default=("*",),
            metavar="LIST",
            help=f'{about} (default: ["*"], all)',
        )
    who.add_argument(
        "--tenant-root",
        action="append",
        default=[],
        type=arguments.path,
        metavar="DIR",
        help="tenants are loaded from below this directory alone; repeatable",
    )


def _settings(args: argparse.Namespace) -> ServerSettings:
    """Raises KeyFileError, ServeError."""
    if args.enable_auto_tool_choice and args.tool_call_parser is None:
        raise ServeError("--enable-auto-tool-choice needs --tool-call-parser; say which format")
    keys = None if args.api_keys is None else KeyRing.read(args.api_keys)
    if keys is None and not _is_loopback(args.host):
        if args.enable_admin:
            raise ServeError(
                f"--enable-admin at {args.host} would let everybody who reaches it change tenants; "
                "give --api-keys FILE (moetel keys new makes keys), or --host 127.0.0.1"
            )
        log.warning(
            "%s can be reached from other machines and no keys are asked for; see --api-keys",
            args.host,
        )
    return ServerSettings(
        keys=keys,
        enable_admin=args.enable_admin,
        tenant_roots=tuple(args.tenant_root),
        rate_limit=args.rate_limit,
        max_request_bytes=args.max_request_bytes,
        max_sequences=args.max_queue,
        drain_timeout_s=args.drain_timeout,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        watch_store=args.watch,
        generation_config=args.generation_config == "auto",
        allowed_origins=args.allowed_origins,
        allowed_methods=args.allowed_methods,
        allowed_headers=args.allowed_headers,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _load(args: argparse.Namespace) -> Engine:
    """Add the tenants that are asked for, and load the store."""
    store = Store.open(args.store)
    for name, checkpoint in args.tenant:
        if name in store.tenants:
            log.info("tenant %s is in the store already", name)
        else:
            log.info("adding tenant %s from %s", name, checkpoint)
            store = add_tenant(args.store, name, checkpoint)
    default_tokens = max(SchedulerOptions.max_num_batched_tokens, args.max_num_seqs)
    options = SchedulerOptions(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or default_tokens,
        prefill_chunk=args.prefill_chunk,
        max_model_len=args.max_model_len,
        max_queue=args.max_queue,
        max_queue_per_tenant=args.max_queue_per_tenant,
        weights=dict(args.tenant_weight),
        limits=dict(args.tenant_limit),
        default_limit=args.default_tenant_limit,
        max_interference=args.max_interference,
    )
    options.check_tenants(store.tenants)
    own = ("kv_cache_bytes", "enable_prefix_caching")
    backend: dict[str, Any] = {n: v for n in own if (v := getattr(args, n)) is not None}
    engine = load_engine(
        store,
        backend=args.backend,
        device=args.device,
        dtype=args.dtype,
        scheduler=options,
        **backend,
    )
    # Tenants whose files are damaged do not keep the others from being served.
    for name, why in engine.load_texts().items():
        log.error("tenant %s is unavailable: %s", name, why)
    if args.warm_up:
        begun = time.perf_counter()
        engine.warm_up()
        log.info("warmed up in %.1f s", time.perf_counter() - begun)
    return engine


def run(args: argparse.Namespace) -> int:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServeError(
            f"the server's packages are not installed ({error}); run: pip install 'moetel[serve]'"
        ) from error
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    settings = _settings(args)
    if args.ray:
        from scripts.ray.local import application_arguments, serve_locally

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        serve_locally(application_arguments(args, parser.get_default), args.host, args.port)
        return 0
    if args.replicas != 1:
        raise ServeError("--replicas needs --ray; leave it out, or add --ray")
    sock = bind(args.host, args.port)
    asyncio.run(serve(lambda: _load(args), settings, sock, args.timeout_keep_alive))
    return 0
