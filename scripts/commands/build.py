"""Build a store of shared experts from checkpoints of fine-tuned models, replacing the store that
is there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common import Store, StoreError, build_store
from common.checkpoints import is_adapter
from common.planning.policies import DEFAULT_EXTRA, DEFAULT_POLICY, POLICIES
from common.progress import bars
from common.store.kinds import kind_of, reference_of
from common.store.manifest import COPY, OWN_EXPERTS
from common.units import format_bytes
from scripts import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store", type=arguments.path, metavar="STORE", help="directory of the store"
    )
    parser.add_argument(
        "--tenant",
        type=arguments.tenant,
        action="append",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="a tenant's name and its Hugging Face, PEFT, T5X or Orbax directory; repeat, in the "
        "order that plans count them",
    )
    parser.add_argument(
        "--base",
        type=arguments.base,
        action="append",
        default=[],
        metavar="PATH",
        help="the model that adapters (PEFT) are for, or NAME=PATH for one tenant's; default: the "
        "one that each adapter names, on this machine",
    )
    parser.add_argument(
        "--config",
        type=arguments.tenant,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="config.json of a tenant whose T5X or Orbax checkpoint has none beside it",
    )
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        default=DEFAULT_POLICY,
        help="how experts are shared, default %(default)s: "
        + "; ".join(f"{name}: {policy.summary}" for name, policy in POLICIES.items()),
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--slots",
        type=arguments.slots,
        help="resident copies, or all (share nothing but identical experts)",
    )
    amount.add_argument(
        "--budget",
        type=arguments.size,
        help="device bytes for experts, residuals and one tenant's other weights, as 60GiB",
    )
    amount.add_argument(
        "--extra",
        type=arguments.share,
        metavar="SHARE",
        help="bytes beyond one copy of each expert, as a share of one model's expert bytes, as "
        "15%; default: "
        f"{DEFAULT_EXTRA:.2%}".replace("%", "%%")
        + " for each tenant",
    )
    arguments.add_plan_arguments(parser)
    parser.add_argument(
        "--own-experts",
        choices=OWN_EXPERTS,
        default=COPY,
        help="tenants' experts that are not resident, default %(default)s. copy: they are put into "
        "the store; reference: they stay in their checkpoints, which must stay as they are; none: "
        "they are dropped once the plan is made, so the store can neither miss nor be planned anew "
        "nor take more tenants",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the store's weights; auto: the tenants' own if they agree, else float32",
    )


def report(store: Store, console: Console) -> None:
    """What a store holds and saves, in three lines."""
    about = store.describe()
    console.print(
        f"{store.path}: {len(store.tenants)} tenants ({', '.join(store.tenants)}), "
        f"{store.family.name}, {store.dtype}"
    )
    reference = reference_of(store)
    for name in store.tenants:
        if name != reference:
            console.print(f"  {name}: beside {reference}: {kind_of(store, name, reference)}")
        for note in store.tenant(name).notes:
            console.print(f"  {name}: {note}")
    console.print(
        f"resident copies: {about['resident_copies']} for {about['positions']} positions x "
        f"{len(store.tenants)} tenants"
        + (
            f"; {about['missing']} look-up places miss and use the tenant's own expert"
            if about["missing"]
            else ""
        )
    )
    if about["residuals"] or about["merged_copies"]:
        share_of_one = about["extra_bytes"] / (about["positions"] * about["copy_bytes"])
        console.print(
            f"{about['merged_copies']} merged copies; {about['residuals']} residuals, "
            f"{format_bytes(about['residual_bytes'])}; {share_of_one:+.1%} of one model's expert "
            "bytes"
        )
    saved = 1 - about["bytes_after"] / about["bytes_before"]
    console.print(
        f"memory: {format_bytes(about['bytes_before'])} as separate models, "
        f"{format_bytes(about['bytes_after'])} shared ({saved:.0%} less)"
    )


def _tenants_of(path: Path) -> tuple[str, ...]:
    """Of the store that is there, if one is."""
    try:
        return Store.open(path).tenants
    except StoreError:
        return ()


def _bases(
    tenants: Sequence[tuple[str, Path]], given: Sequence[tuple[str | None, Path]]
) -> dict[str, Path]:
    """The base of each tenant that one is given for: a named one, else the one for all adapters.

    Raises StoreError.
    """
    for_all = [path for name, path in given if name is None]
    if len(for_all) > 1:
        raise StoreError(
            f"--base is given twice for all adapters ({for_all[0]}, {for_all[1]}); write "
            "--base NAME=PATH where they differ"
        )
    adapters = [name for name, path in tenants if is_adapter(path)]
    if for_all and not adapters:
        raise StoreError(
            f"--base {for_all[0]}: no tenant of this build is an adapter; leave --base out"
        )
    found = {name: path for path in for_all for name in adapters}
    return found | {name: path for name, path in given if name is not None}


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    replaced = _tenants_of(args.store)
    store = build_store(
        args.store,
        args.tenant,
        policy=args.policy,
        slots=args.slots,
        budget_bytes=args.budget,
        extra=args.extra,
        calibration=dict(args.calibrate),
        traffic=dict(args.traffic),
        dtype=args.dtype,
        configs=dict(args.config),
        own_experts=args.own_experts,
        bases=_bases(args.tenant, args.base),
        progress=bars,
    )
    report(store, console)
    if replaced:
        console.print(f"this replaced the store of {', '.join(replaced)} that was there")
    return 0
