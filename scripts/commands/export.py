"""Write a tenant, as the store serves it, as a plain Hugging Face checkpoint that transformers
loads."""

from __future__ import annotations

import argparse

from rich.console import Console

from common import Store
from common.progress import bars
from scripts import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument("--tenant", required=True, metavar="NAME")
    parser.add_argument(
        "target",
        type=arguments.path,
        metavar="DIR",
        help="a directory that does not exist or is empty",
    )


def run(args: argparse.Namespace) -> int:
    store = Store.open(args.store)
    store.export(args.tenant, args.target, bars)
    Console(highlight=False, soft_wrap=True).print(
        f"{args.target}: tenant {args.tenant} as served by {args.store}"
    )
    return 0
