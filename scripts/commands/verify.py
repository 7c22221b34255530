"""Check every file of a store against its checksum; names the damaged ones and what they hold."""

from __future__ import annotations

import argparse

from rich.console import Console

from common import Store, StoreError
from common.progress import bars
from scripts import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")


def run(args: argparse.Namespace) -> int:
    store = Store.open(args.store)
    console = Console(highlight=False, soft_wrap=True)
    with bars("checking files", len(store.manifest.objects)) as advance:
        problems = store.verify(advance)
    for problem in problems:
        console.print(f"{problem.file}: {problem.what}", markup=False)
        owners = store.owners_of(problem.object_ids)
        if owners:
            more = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
            console.print(f"  holds {'; '.join(owners[:3])}{more}", markup=False)
    if problems:
        raise StoreError(
            f"{args.store}: {len(problems)} damaged files; build the store again from its "
            "checkpoints"
        )
    leftovers = store.objects.unreferenced(set(store.manifest.objects))
    if leftovers:
        console.print(
            f"{len(leftovers)} files of an interrupted build, which the next build removes"
        )
    console.print(f"{args.store}: sound, {len(store.manifest.objects)} tensors checked")
    return 0
