"""Add a tenant to a store, and plan again with the settings that it was built with, or keep its
plan."""

from __future__ import annotations

import argparse

from rich.console import Console

from common import PlanError, add_tenant, extend_store
from common.build.examples import CalibrationSet
from common.progress import bars
from scripts import arguments
from scripts.commands import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument("--tenant", type=arguments.tenant, required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument(
        "--config",
        type=arguments.path,
        metavar="FILE",
        help="config.json of a T5X or Orbax checkpoint",
    )
    parser.add_argument(
        "--base",
        type=arguments.path,
        metavar="PATH",
        help="the model that an adapter (PEFT) is for; default: the one that it names",
    )
    parser.add_argument(
        "--calibrate",
        type=arguments.path,
        metavar="FILE",
        help="the tenant's typical prompts, JSONL; see build",
    )
    parser.add_argument(
        "--keep-plan",
        action="store_true",
        help="leave what other tenants are served bit for bit as it is; worse for the new one than "
        "a new plan",
    )
    parser.add_argument(
        "--extra",
        type=arguments.share,
        metavar="SHARE",
        help="with --keep-plan: bytes for the new tenant's residuals, as a share of one model's "
        "expert bytes, as 5%%",
    )


def run(args: argparse.Namespace) -> int:
    name, checkpoint = args.tenant
    if args.keep_plan:
        if args.calibrate:
            raise PlanError(
                "--keep-plan makes no use of calibration; leave --calibrate out, or plan anew"
            )
        store = extend_store(
            args.store,
            name,
            checkpoint,
            config=args.config,
            base=args.base,
            extra=args.extra,
            progress=bars,
        )
    else:
        if args.extra is not None:
            raise PlanError(
                "--extra goes with --keep-plan; `moetel plan --extra` gives a store more memory"
            )
        examples = CalibrationSet.read(args.calibrate) if args.calibrate else None
        store = add_tenant(
            args.store,
            name,
            checkpoint,
            config=args.config,
            base=args.base,
            calibration=examples,
            progress=bars,
        )
    build.report(store, Console(highlight=False, soft_wrap=True))
    return 0
