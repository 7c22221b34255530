"""The main job, on the tenants shipped in examples/: build a store, show what it saves, let each
tenant answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common import SamplingParams, Store, build_store, load_engine
from common.build.examples import CalibrationSet
from common.planning.policies import DEFAULT_POLICY, POLICIES
from common.progress import bars
from scripts import arguments
from scripts.cli import guarded
from scripts.commands import build
from scripts.demo.number_words import LANGUAGES, expected, held_out

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tenants"

# Where the tenants of each family lie, and the end of their store's name.
FAMILIES = {"mixtral": (EXAMPLES, ""), "switch": (EXAMPLES / "switch", "-switch")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        type=arguments.path,
        default=Path("stores/demo"),
        help="where the store goes; Switch's has -switch behind it",
    )
    parser.add_argument(
        "--family",
        choices=(*FAMILIES, "both"),
        default="both",
        help="mixtral: the PyTorch engine; switch: the JAX engine",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--slots", type=arguments.slots, help="resident copies, nothing beside them, or all"
    )
    amount.add_argument(
        "--extra",
        type=arguments.share,
        help="bytes beyond one model's experts, as a share of them, as 15%%",
    )
    parser.add_argument(
        "--policy", choices=POLICIES, default=DEFAULT_POLICY, help="default: %(default)s"
    )
    parser.add_argument(
        "--show", type=int, default=4, metavar="N", help="answers shown for each tenant"
    )
    parser.add_argument(
        "--score", type=int, default=200, metavar="N", help="held-out numbers that the score counts"
    )


def answers(store: Store, numbers: list[int]) -> dict[str, list[str]]:
    """Each tenant's greedy answer to each number; tenants are mixed in one batch."""
    requests = [(tenant, str(number)) for tenant in store.tenants for number in numbers]
    with load_engine(store) as engine:
        found = engine.generate_batch(requests, SamplingParams(max_new_tokens=96))
    texts = [out.text or "" for out in found]
    return {
        t: texts[i * len(numbers) : (i + 1) * len(numbers)] for i, t in enumerate(store.tenants)
    }


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    for family in FAMILIES if args.family == "both" else (args.family,):
        one_family(args, family, console)
    return 0


def one_family(args: argparse.Namespace, family: str, console: Console) -> None:
    """Build, answer, score."""
    folder, ending = FAMILIES[family]
    path = args.store.with_name(args.store.name + ending)
    examples = CalibrationSet.read(EXAMPLES / "calibration.jsonl")
    store = build_store(
        path,
        {lang: folder / lang for lang in LANGUAGES},
        policy=args.policy,
        slots=args.slots,
        extra=args.extra,
        calibration=None if args.policy == "round_robin" else dict.fromkeys(LANGUAGES, examples),
        progress=bars,
    )
    build.report(store, console)
    numbers = held_out(max(args.show, args.score))
    found = answers(store, numbers)
    table = Table(
        title=f"{store.family.name}: numbers that no tenant saw in training, answered from the "
        "shared experts",
        title_justify="left",
    )
    for column in ("tenant", "prompt", "answer", "expected", ""):
        table.add_column(column, overflow="fold")
    for tenant in store.tenants:
        for number, answer in list(zip(numbers, found[tenant], strict=True))[: args.show]:
            right = answer == expected(number, tenant)
            table.add_row(
                tenant, str(number), answer, expected(number, tenant), "right" if right else "wrong"
            )
        table.add_section()
    console.print(table)
    for tenant in store.tenants:
        score = sum(a == expected(n, tenant) for n, a in zip(numbers, found[tenant], strict=True))
        console.print(
            f"{tenant}: {score} of {len(numbers)} held-out numbers right "
            f"({score / len(numbers):.1%})"
        )
    moetel = Path(sys.executable).with_name("moetel")
    shown = moetel.relative_to(Path.cwd()) if moetel.is_relative_to(Path.cwd()) else moetel
    console.print(f"try it: {shown} generate {store.path} --tenant fr --prompt 1234")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo", description=__doc__)
    add_arguments(parser)
    return guarded(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
