"""Show a store: tenants, provenance, memory, distances a layer, and the plan; --plot draws
distances and plan."""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from common import Store
from common.build.beside import came_and_went
from common.plan.plan import MERGED
from common.store.kinds import kind_of, reference_of
from common.store.pack import bytes_by_part
from common.units import format_bytes
from scripts import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument(
        "--plot",
        type=arguments.path,
        metavar="FILE.png",
        help="draw distances and plan, layers x experts",
    )


def tenants_table(store: Store) -> Table:
    """A row a tenant: where it came from, what it keeps, owns and misses."""
    table = Table(title=f"{store.path}: {store.family.name}, {store.dtype}", title_justify="left")
    table.add_column("tenant")
    reference = reference_of(store)
    table.add_column(f"beside {reference}", overflow="fold")
    for column in (
        "vocabulary",
        "context",
        "non-expert weights",
        "copies owned",
        "positions missing",
        "residuals",
    ):
        table.add_column(column, justify="right")
    table.add_column("tokenizer")
    table.add_column("source", overflow="fold")
    for index, name in enumerate(store.tenants):
        tenant = store.tenant(name)
        owned = sum(copy.owner == index for copy in store.plan.copies)
        missing = int((store.plan.serving[index] < 0).sum())
        residuals = [r for r in store.plan.residuals if r.tenant == index]
        residual_bytes = sum(r.nbytes(dict(store.experts.projections)) for r in residuals)
        has_tokenizer = any(
            f.startswith("tokenizer") or f.endswith(".model") for f in tenant.assets
        )
        table.add_row(
            name,
            "-" if name == reference else str(kind_of(store, name, reference)),
            str(tenant.config.vocab_size),
            str(tenant.config.max_positions),
            format_bytes(store.non_expert_bytes(name)),
            str(owned),
            str(missing),
            f"{len(residuals)}, {format_bytes(residual_bytes)}" if residuals else "none",
            "yes" if has_tokenizer else "no",
            tenant.source,
        )
    return table


def memory_table(store: Store) -> Table:
    about = store.describe()
    table = Table(title="memory", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("as separate models", format_bytes(about["bytes_before"]))
    table.add_row(
        "shared: copies, residuals and all tenants' non-expert weights",
        format_bytes(about["bytes_after"]),
    )
    table.add_row(
        "shared: copies, residuals and one tenant (what --budget counts)",
        format_bytes(about["bytes_budget"]),
    )
    table.add_row("one copy of an expert", format_bytes(about["copy_bytes"]))
    merged = f", {about['merged_copies']} of them merged" if about["merged_copies"] else ""
    table.add_row(
        "resident copies", f"{about['resident_copies']} for {about['positions']} positions{merged}"
    )
    table.add_row("residuals", f"{about['residuals']}, {format_bytes(about['residual_bytes'])}")
    return table


def disk_table(store: Store) -> Table:
    """A row a part of the store: what it takes on disk."""
    table = Table(title="on disk", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, nbytes in bytes_by_part(store).items():
        if nbytes:
            table.add_row(part, format_bytes(nbytes))
    table.add_row("all files of tensors", format_bytes(store.describe()["bytes_on_disk"]))
    return table


def distances_table(store: Store) -> Table:
    """A row a layer: L2 distances over its experts and all pairs, and where the plan's copies come
    from."""
    table = Table(
        title="L2 distance between tenants' experts, and resident copies", title_justify="left"
    )
    table.add_column("layer")
    for column in ("mean", "std", "min", "max", "copies", "of"):
        table.add_column(column, justify="left" if column == "of" else "right")
    for layer, summary in enumerate(store.manifest.similarity["layers"]):
        here = [copy for copy in store.plan.copies if copy.layer == layer]
        owned = [c.owner for c in here if c.owner != MERGED]
        counts = [*np.bincount(owned, minlength=len(store.tenants)), len(here) - len(owned)]
        owners = ", ".join(
            f"{name} {n}" for name, n in zip((*store.tenants, "merged"), counts, strict=True) if n
        )
        table.add_row(
            store.experts.expert_layers[layer],
            *(f"{summary[key]:.4g}" for key in ("mean", "std", "min", "max")),
            str(len(here)),
            owners,
        )
    return table


def beside_plan(store: Store) -> str | None:
    """What a plan was made for, if tenants came or went since; else None."""
    added, removed = came_and_went(store)
    if not added and not removed:
        return None
    planned = len(store.tenants) - len(added) + len(removed)
    changes = [
        f"{len(names)} {what} ({', '.join(names)})"
        for names, what in ((added, "added"), (removed, "removed"))
    ]
    return (
        f"planned for {planned} tenants, "
        f"{' and '.join(c for c in changes if not c.startswith('0 '))} beside the plan; "
        "run `moetel plan --apply` to plan anew"
    )


def run(args: argparse.Namespace) -> int:
    store = Store.open(args.store)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or pipe has no width; wide enough that nothing is cut
    for table in (
        tenants_table(store),
        memory_table(store),
        disk_table(store),
        distances_table(store),
    ):
        console.print(table)
    settings = store.manifest.provenance
    asked = settings["settings"]
    amount = "one copy a position, extra bytes as the policy likes"
    if asked["budget_bytes"] is not None:
        amount = f"budget {format_bytes(asked['budget_bytes'])}"
    elif asked["slots"] is not None:
        amount = f"slots {asked['slots']}"
    elif asked.get("extra") is not None:
        amount = f"extra {asked['extra']:.1%}"
    console.print(
        f"built {settings['created']} by Moetel {settings['versions']['moetel']}; policy "
        f"{asked['policy']}, {amount}"
    )
    changed = beside_plan(store)
    if changed:
        console.print(changed)
    calibrated = ", ".join(store.manifest.calibration) or "none"
    console.print(f"calibrated tenants: {calibrated}")
    if store.manifest.prediction is not None:
        losses = zip(store.tenants, store.manifest.prediction["losses"], strict=True)
        unit = store.manifest.prediction["unit"]
        # That of a tenant added beside the plan is not known in nats: it was never run.
        found = (
            f"{name} {'not known' if loss is None else f'{loss:.4g}'}" for name, loss in losses
        )
        console.print(f"predicted loss, {unit}: " + ", ".join(found))
    if args.plot:
        from scripts.store_plot import draw_store

        draw_store(store, args.plot)
        console.print(f"drawn: {args.plot}")
    return 0
