"""Load-test tenants: throughput, time to first and last token against arrival rate.

    moetel bench STORE              the engine of this process, on the tenants of a store
    moetel bench STORE --request-rate 2 4
    moetel bench --url http://127.0.0.1:8000 --tenants fr de --request-rate 2 --vocab-size 32000

Requests arrive whatever became of those before (open loop), for each tenant as a Poisson process of
its own or burstier (--burstiness), tenants alike or by a power law (--skew). Results are those of
`vllm bench serve`, with times counted from the planned arrival. The key of a server that wants one
is read from OPENAI_API_KEY.

In a clone of the repository, `python -m scripts.cli bench` also compares ways to serve tenants:

    ... bench                       five systems on a random Mixtral's tenants
    ... bench STORE --systems single moetel paper partition time_sharing
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rich.console import Console

from common import Store
from common.progress import bars
from common.serving.scheduler_options import SchedulerOptions
from scripts import arguments, lab
from scripts.load.engine_system import EngineSystem, Setup
from scripts.load.experiment import LOADS, Comparison, Experiment, Opener, compare
from scripts.load.report import remarks, row, table, write
from scripts.load.run import System
from scripts.load.summary import Goodput
from scripts.load.traffic import Load, TrafficError
from scripts.provenance import provenance

SYSTEMS = ("single", "moetel", "paper", "partition", "time_sharing")
"""In the order in which they are tested: the first one's saturation sets the rates. All but moetel
are `benchmarks.lab`'s."""

MODELS = (
    "mixtral",
    "mixtral-slice",
    "olmoe",
    "qwen3-30b-a3b",
    "switch",
    "tiny-mixtral",
    "tiny-switch",
)
"""Shapes of random tenants, from `benchmarks.material.random_models`."""

WIDTH = 150
"""Characters that the table needs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what is tested")
    what.add_argument(
        "store",
        type=arguments.path,
        nargs="?",
        metavar="STORE",
        help="default: a store of random tenants",
    )
    what.add_argument(
        "--random",
        choices=MODELS,
        default="mixtral",
        help="shape of random tenants (default: %(default)s)",
    )
    what.add_argument(
        "--num-tenants",
        type=int,
        default=4,
        metavar="N",
        help="random tenants (default: %(default)s)",
    )
    what.add_argument(
        "--work",
        type=arguments.path,
        metavar="DIR",
        help="where random stores are kept (default: ~/.cache/moetel/bench)",
    )
    what.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        metavar="NAME",
        help="of: %(choices)s; default: moetel, without a STORE all",
    )
    what.add_argument("--url", help="test a server with OpenAI's routes instead")
    what.add_argument(
        "--tenants", nargs="+", metavar="NAME", help="with --url: the names of its models"
    )
    what.add_argument(
        "--vocab-size",
        type=int,
        default=32000,
        metavar="N",
        help="with --url: prompts hold ids below this",
    )

    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=float,
        nargs="+",
        metavar="R",
        help="requests a second of all tenants, a test each; inf with --num-prompts (default: "
        "--load)",
    )
    load.add_argument(
        "--load",
        type=float,
        nargs="+",
        default=list(LOADS),
        metavar="SHARE",
        help="rates as shares of the rate at which the first system saturates; 0.7 is always among "
        "them",
    )
    load.add_argument(
        "--num-prompts", type=int, metavar="N", help="requests of each test, instead of --duration"
    )
    load.add_argument(
        "--drain",
        type=float,
        metavar="S",
        help="wait so long for late answers (default: as --duration)",
    )
    load.add_argument("--seed", type=int, default=0)
    default: float
    for flag, default, unit, about in (
        ("--duration", 15.0, "S", "of each test, in seconds"),
        ("--skew", 0.0, "A", "tenant i has a share ~ (i+1)^-A"),
        ("--burstiness", 1.0, "B", "1 Poisson, below bursts, inf constant"),
        ("--input-len", 32, "N", "tokens of prompts"),
        ("--output-len", 25, "N", "tokens of answers"),
        ("--random-range-ratio", 0.5, "R", "lengths are uniform in (1-R) to (1+R) times these"),
        ("--flood", 8.0, "X", "test moetel again with one tenant sending X times its rate; 0: not"),
        ("--pairs", 3, "N", "test single and moetel N times in turn, both loaded; 0: not"),
    ):
        load.add_argument(
            flag,
            type=type(default),
            default=default,
            metavar=unit,
            help=f"{about} (default: {default:g})",
        )
    load.add_argument("--flood-tenant", metavar="NAME", help="which (default: the last)")

    engine = parser.add_argument_group("engine")
    arguments.add_engine_arguments(engine)
    engine.add_argument(
        "--max-num-seqs",
        type=int,
        default=16,
        metavar="N",
        help="requests of a step (default: %(default)s)",
    )
    engine.add_argument(
        "--default-tenant-limit", type=int, metavar="N", help="most of them that are one tenant's"
    )
    engine.add_argument(
        "--max-interference",
        type=float,
        default=SchedulerOptions.max_interference,
        metavar="X",
        help="how much longer steps may get by places beyond a tenant's share (default: "
        "%(default)s; inf: any)",
    )

    results = parser.add_argument_group("results")
    results.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="GOAL:MS",
        help="count good requests, as ttft:200 tpot:50 e2el:5000",
    )
    results.add_argument("--percentiles", default="50,90,95,99", help="default: %(default)s")
    results.add_argument(
        "--out",
        type=arguments.path,
        metavar="DIR",
        help="write NAME.json, NAME.md and NAME.png here",
    )
    results.add_argument("--name", default="qos", help="of those files (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    console = Console(soft_wrap=True, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    if args.url:
        if args.store is not None or not args.tenants or not args.request_rate:
            raise TrafficError(
                "--url tests a server: give --tenants and --request-rate, and no STORE"
            )
        vocab_sizes = dict.fromkeys(args.tenants, args.vocab_size)
        openers: dict[str, Opener] = {"http": partial(_open_http, args.url)}
    else:
        if args.tenants:
            raise TrafficError(
                "--tenants names the models of a server, with --url; a store's are all tested"
            )
        store = Store.open(args.store) if args.store is not None else _random(args)
        vocab_sizes = {name: store.config(name).vocab_size for name in store.tenants}
        openers = _openers(args, store)
    experiment = _experiment(args, vocab_sizes)

    def show(text: str) -> None:
        errors.print(text, style="dim")

    async def test() -> Comparison:
        found = await compare(
            openers,
            experiment,
            on_step=show,
            on_cell=lambda cell: show("  " + "  ".join(row(cell))),
        )
        if len(openers) > 1:
            await lab.load("lab.in_turn", "--pairs").test_in_turn(
                openers, experiment, args.pairs, found, show
            )
            judged = lab.load("lab.judge", "--systems").judge(found)
            found.aims = [str(aim) for aim in judged if aim.value is not None]
        return found

    found = asyncio.run(test())
    Console(width=max(console.width, WIDTH), highlight=False).print(table(found.cells))
    for line in remarks(found):
        console.print(line)
    if args.out is not None:
        _write(args, found, console)
    return 0


async def _open_http(url: str) -> System:
    from scripts.load.openai_server import OpenAIServer

    return OpenAIServer(url, os.environ.get("OPENAI_API_KEY"))


def _openers(args: argparse.Namespace, store: Store) -> dict[str, Opener]:
    """The systems that are asked for."""
    setup = Setup(
        store.path,
        args.max_num_seqs,
        args.default_tenant_limit,
        args.max_interference,
        {"device": args.device, "dtype": args.dtype},
    )
    names = args.systems or (SYSTEMS if args.store is None else ["moetel"])
    if list(names) == ["moetel"]:
        return {"moetel": partial(EngineSystem.load, "moetel", store, setup)}
    systems = lab.load("lab.systems", "--systems with anything but moetel")
    return {name: partial(systems.open_system, name, setup) for name in SYSTEMS if name in names}


def _random(args: argparse.Namespace) -> Store:
    if args.num_tenants < 1:
        raise TrafficError(f"{args.num_tenants} tenants; give at least 1")
    work = (
        args.work
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetel" / "bench"
    )
    dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    models = lab.load("material.random_models", "a test of random tenants (no STORE is given)")
    store: Store = models.random_store(work, args.random, args.num_tenants, dtype, bars)
    return store


def _experiment(args: argparse.Namespace, vocab_sizes: Mapping[str, int]) -> Experiment:
    """Raises TrafficError."""
    try:
        percentiles = tuple(float(p) for p in args.percentiles.split(","))
    except ValueError:
        percentiles = (-1.0,)
    if not all(0 <= p <= 100 for p in percentiles):
        raise TrafficError(
            f"percentiles {args.percentiles!r}; write numbers from 0 to 100, as 50,90,99"
        )
    if not args.load or not all(share > 0 for share in args.load):
        raise TrafficError("load: give shares above 0")
    if not args.duration > 0 or (args.drain is not None and not args.drain >= 0):
        raise TrafficError("duration and drain: give seconds, a duration above 0")
    if args.max_num_seqs < 1:
        raise TrafficError(f"max-num-seqs is {args.max_num_seqs}; give a whole number from 1")
    if args.pairs < 0:
        raise TrafficError(f"pairs is {args.pairs}; give a whole number from 0")
    if args.flood_tenant is not None and args.flood_tenant not in vocab_sizes:
        raise TrafficError(
            f"tenant {args.flood_tenant!r} is to flood, but there is: {', '.join(vocab_sizes)}"
        )
    return Experiment(
        vocab_sizes=vocab_sizes,
        load=Load(
            skew=args.skew,
            burstiness=args.burstiness,
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=args.random_range_ratio,
            seed=args.seed,
        ),
        request_rates=tuple(args.request_rate) if args.request_rate else None,
        loads=tuple(args.load),
        duration_s=None if args.num_prompts else args.duration,
        num_requests=args.num_prompts,
        drain_s=args.duration if args.drain is None else args.drain,
        # A server is somebody else's: it is not driven to its limit unasked.
        capacity_s=0.0 if args.url else max(1.0, 0.4 * args.duration),
        concurrency=args.max_num_seqs,
        percentiles=percentiles,
        goodput=Goodput.parse(args.goodput),
        flood_factor=args.flood,
        flood_tenant=args.flood_tenant,
    )


def _write(args: argparse.Namespace, found: Comparison, console: Console) -> None:
    what = args.url or args.store or f"{args.num_tenants} random tenants ({args.random})"
    left_out = ("command", "out", "name", "work", "store", "url")
    options = {k: v for k, v in vars(args).items() if k not in left_out and not callable(v)}
    for path in write(found, args.out, provenance(), options, f"QoS: {what}", args.name):
        console.print(f"written: {path}")
