"""Measure quality: what is left of each tenant's as a store serves it, beside running alone.

    moetel eval STORE --task fr=fr.jsonl --task de=de.jsonl --out results

A task is a JSONL file. Lines {"prompt": ..., "answer": ...} are answered greedily (exact match,
ROUGE); lines {"prompt": ...} alone count for divergence only; lines {"text": ...} are scored by
perplexity. For all of them the served tenant's next-token distributions are compared with the
tenant's own when it stands alone.

In a clone of the repository, policies and merging baselines are compared against memory
(benchmarks/quality/methods.py has them all):

    python -m scripts.cli eval --tenant fr=checkpoints/fr --tenant de=checkpoints/de \\
        --base checkpoints/base --task fr=fr.jsonl --task de=de.jsonl \\
        --methods round_robin auto@0.15 average ties:density=0.2 --out results
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from common import MoetelError, Store
from common.build.examples import CalibrationSet
from common.progress import bars
from scripts import arguments, lab
from scripts.quality import report
from scripts.quality.measure import evaluate_store
from scripts.quality.report import cell, table
from scripts.quality.scores import Result
from scripts.quality.task import METRICS, Options, Task, TaskError


def method(text: str) -> Any:
    """A method, for argparse."""
    try:
        return lab.load("quality.methods", "--methods").Method.parse(text)
    except MoetelError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "store", type=arguments.path, nargs="?", metavar="STORE", help="a store to measure as it is"
    )
    parser.add_argument(
        "--tenant",
        type=arguments.tenant,
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="instead of STORE: a tenant; repeat, in the order that plans count them",
    )
    parser.add_argument(
        "--base",
        type=arguments.path,
        metavar="CHECKPOINT",
        help="what they were tuned from, for merging methods",
    )
    parser.add_argument(
        "--task",
        type=arguments.tenant,
        action="append",
        required=True,
        metavar="NAME=FILE.jsonl",
        help="what a tenant is judged by; repeat",
    )
    parser.add_argument(
        "--calibration",
        type=arguments.tenant,
        action="append",
        default=[],
        metavar="NAME=FILE.jsonl",
        help="examples of a tenant's use, other than its task's, for policies that measure before "
        "they plan",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method,
        metavar="METHOD",
        help="NAME[@EXTRA][:option=value,...]; default: every policy, and the merging methods",
    )
    parser.add_argument(
        "--extra",
        nargs="+",
        type=float,
        default=[],
        metavar="SHARE",
        help="memory beyond one model's experts for the policies of the default methods, as 0.05 "
        "0.15",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="lines of each kind taken from a task file"
    )
    defaults = Options()
    parser.add_argument(
        "--window", type=int, metavar="TOKENS", help="of perplexity; default: 512 or the context"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="new tokens in each window; default: the window",
    )
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    parser.add_argument(
        "--forced",
        choices=("own", "given"),
        default=defaults.forced,
        help="compare distributions along the tenant's own greedy answer (default) or the given "
        "one",
    )
    parser.add_argument(
        "--positions",
        type=int,
        default=defaults.positions,
        metavar="N",
        help="of a tenant at which distributions are compared, at most; default "
        f"{defaults.positions}",
    )
    parser.add_argument(
        "--metric", choices=METRICS, default=defaults.metric, help="what 'kept' compares"
    )
    arguments.add_engine_arguments(parser)
    parser.add_argument(
        "--scratch", type=arguments.path, metavar="DIR", help="for stores and logits, emptied again"
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        metavar="DIR",
        help="write quality.json and quality.md here, with --tenant quality.png as well",
    )


def run(args: argparse.Namespace) -> int:
    if (args.store is None) == (not args.tenant):
        raise TaskError("give either a STORE, or tenants with --tenant NAME=CHECKPOINT")
    if args.store is not None and (args.methods or args.base or args.calibration or args.extra):
        raise TaskError(
            "a STORE is measured as it is; --methods, --extra, --base and --calibration go with "
            "--tenant"
        )
    options = Options(
        args.window,
        args.stride,
        args.max_new_tokens,
        args.forced,
        args.positions,
        metric=args.metric,
        device=args.device,
        dtype=args.dtype,
        scratch=args.scratch,
    )
    tasks = {name: Task.read(path, args.limit) for name, path in args.task}
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    found: list[Result] = []

    def keep(result: Result) -> None:
        found.append(result)
        console.print(
            f"{result.method}: {result.memory.share:.1%} of one model's expert memory, kept "
            f"{cell([result.mean('kept')], '.1%')} (worst {cell([result.worst('kept')], '.1%')}), "
            f"KL {cell([result.mean('kl')], '.2e')} (worst {cell([result.worst('kl')], '.2e')})"
        )
        if args.out:
            writer.write(found, args.out, options)

    writer: Any = report
    if args.store is not None:
        evaluate_store(Store.open(args.store), tasks, options, keep, bars)
    else:
        writer, methods, workshop = (
            lab.load(f"quality.{name}", "a comparison of methods (--tenant)")
            for name in ("plot", "methods", "workshop")
        )
        calibration = {name: CalibrationSet.read(path) for name, path in args.calibration}
        material = workshop.Material(dict(args.tenant), tasks, args.base, calibration or None)
        asked = args.methods or methods.usual_methods(args.extra, args.base is not None)
        workshop.evaluate([material], asked, options, keep, bars)
    titles, rows = table(found)
    shown = Table(title="quality against memory", title_justify="left")
    for title in titles:
        shown.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    if args.out:
        console.print(f"written: {', '.join(map(str, sorted(args.out.glob('quality.*'))))}")
    return 0
