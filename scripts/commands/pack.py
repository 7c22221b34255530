"""Write a store that serves the same tenants and holds only what that needs."""

from __future__ import annotations

import argparse

from rich.console import Console

from common import Store, pack_store
from common.progress import bars
from common.units import format_bytes
from scripts import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument(
        "target",
        type=arguments.path,
        metavar="OUT",
        help="a directory that does not exist or is empty",
    )


def run(args: argparse.Namespace) -> int:
    store = Store.open(args.store)
    packed = pack_store(store, args.target, bars)
    before, after = (s.describe()["bytes_on_disk"] for s in (store, packed))
    Console(highlight=False, soft_wrap=True).print(
        f"{args.target}: {format_bytes(after)} of {args.store}'s {format_bytes(before)}; it serves "
        "the same, and cannot be planned anew or take other tenants"
    )
    return 0
