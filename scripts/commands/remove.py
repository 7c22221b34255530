"""Remove a tenant from a store, free what only it used, and plan again or keep the plan."""

from __future__ import annotations

import argparse

from rich.console import Console

from common import remove_tenant
from common.progress import bars
from scripts import arguments
from scripts.commands import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument("--tenant", required=True, metavar="NAME")
    parser.add_argument(
        "--keep-plan",
        action="store_true",
        help="leave what other tenants are served bit for bit as it is",
    )


def run(args: argparse.Namespace) -> int:
    store = remove_tenant(args.store, args.tenant, keep_plan=args.keep_plan, progress=bars)
    build.report(store, Console(highlight=False, soft_wrap=True))
    return 0
