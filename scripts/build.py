"""Build a store of shared experts from checkpoints of fine-tuned models, replacing the store that
is there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from common import RequestError, Store, StoreError, build_store
from common.build.examples import CalibrationSet
from common.planning.policies import DEFAULT_EXTRA, DEFAULT_POLICY, POLICIES
from common.progress import bars
from common.store.kinds import kind_of, reference_of
from common.units import format_bytes, parse_bytes
from scripts import command


def tenant(text: str) -> tuple[str, Path]:
    """`NAME=CHECKPOINT`, for argparse."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write NAME=CHECKPOINT, for example fr=checkpoints/french"
        )
    return name, command.path(path)


def slots(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, or all") from None


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """`15%` or `0.15`, for argparse. A plain number above 1 is more likely a forgotten % than many
    models' worth."""
    percent = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a share of one model's expert bytes, as 15% or 0.15"
        )
    if value > 1 and not percent:
        raise argparse.ArgumentTypeError(
            f"{text!r} is {value:.0%} of one model's expert bytes; write {text}% or "
            f"{value / 100:g} for a hundredth of "
            f"that, {value:.0%} if you mean it"
        )
    return value


def calibration(text: str) -> tuple[str, CalibrationSet]:
    """`NAME=FILE.jsonl`, for argparse."""
    name, path = tenant(text)
    try:
        return name, CalibrationSet.read(path)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def traffic(text: str) -> tuple[str, float]:
    """`NAME=WEIGHT`, for argparse."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=WEIGHT, for example fr=3") from None


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What planning can be told, beside how much memory there is."""
    parser.add_argument(
        "--calibrate",
        type=calibration,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a tenant's typical prompts, a few hundred: JSONL lines of prompt (and answer) or "
        "text; repeat",
    )
    parser.add_argument(
        "--traffic",
        type=traffic,
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help="how many requests a tenant has where one that is not named has one; default: all the "
        "same",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=command.path, metavar="STORE", help="directory of the store")
    parser.add_argument(
        "--tenant",
        type=tenant,
        action="append",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="a tenant's name and its Hugging Face, T5X or Orbax directory; repeat, in the order "
        "that plans count them",
    )
    parser.add_argument(
        "--config",
        type=tenant,
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
        "--slots", type=slots, help="resident copies, or all (share nothing but identical experts)"
    )
    amount.add_argument(
        "--budget",
        type=size,
        help="device bytes for experts, residuals and one tenant's other weights, as 60GiB",
    )
    amount.add_argument(
        "--extra",
        type=share,
        metavar="SHARE",
        help="bytes beyond one copy of each expert, as a share of one model's expert bytes, as "
        "15%; default: "
        f"{DEFAULT_EXTRA:.2%}".replace("%", "%%")
        + " for each tenant",
    )
    add_plan_arguments(parser)
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
        progress=bars,
    )
    report(store, console)
    if replaced:
        console.print(f"this replaced the store of {', '.join(replaced)} that was there")
    return 0


if __name__ == "__main__":
    sys.exit(command.main("build", sys.modules[__name__]))
