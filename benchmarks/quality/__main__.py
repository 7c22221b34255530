"""What sharing costs in quality, on tenants trained for it, beside the paper's rule and merging.

    python -m benchmarks.quality numbers --material DIR --train --seeds 0 1 2 --tenants 4 10
    python -m benchmarks.quality text --material DIR --train --seeds 0 1 2
    python -m benchmarks.quality switch --material DIR --train --seeds 0 1 2 --tenants 2 3 4 10

DIR holds numbers/seedN, text/seedN and switch/seedN. --train makes what is not there, a process and
a core for each seed. `RECIPES` says how; --folder names another recipe, as text_mild.

numbers: Mixtrals that spell numbers in a language each, by exactly right held-out numbers.
text: Mixtrals tuned on different texts, by perplexity (the paper's table, arXiv 2505.06481).
switch: Switch Transformers that spell numbers, by the first tenant's score as more share experts.
Calibration prompts are numbers and texts of training.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.methods import Method, usual_methods
from benchmarks.quality.plot import notes, write
from benchmarks.quality.workshop import Material, evaluate
from common import MoetelError
from common.build.examples import CalibrationSet
from common.progress import bars, silent
from scripts.demo.number_words import ALL_LANGUAGES, expected, held_out, training_numbers
from scripts.provenance import provenance
from scripts.quality.report import by_method, cell, markdown
from scripts.quality.scores import Result
from scripts.quality.task import Options, Question, Task, TaskError

# What makes a folder's seeds.
RECIPES: dict[str, tuple[str, ...]] = {
    "numbers": (
        "benchmarks.material.train_demo",
        "--preset",
        "ten",
        "--scored",
        "100",
        "--threads",
        "1",
    ),
    "text": ("benchmarks.material.train_text", "--threads", "1"),
    "text_mild": ("benchmarks.material.train_text", "--tune-lr", "5e-4", "--threads", "1"),
    "text_broad": tuple(
        (
            "benchmarks.material.train_text --base-on-all --base-steps 1800 --tune-lr 5e-4 "
            "--threads 1"
        ).split()
    ),
    "switch": ("benchmarks.material.train_switch_demo", "--preset", "ten"),
}
TEXTS = ("base", "ptb", "code", "docs")
FAMILIES = ("numbers", "text", "switch")

# Numbers of tenants, and the memory beyond one model's experts that policies are given for each
# number.
TENANTS = {"numbers": [4, 10], "text": [4], "switch": [2, 3, 4, 10]}
EXTRA = {2: [0.1], 3: [0.125], 4: [0.05, 0.1, 0.15], 10: [0.1, 0.2, 0.4]}


def number_task(language: str, count: int) -> Task:
    """Held-out numbers and their words."""
    return Task(
        tuple(Question(str(n), expected(n, language)) for n in held_out(count)),
        source=f"numbers, {language}",
    )


def number_prompts(count: int, seed: int) -> CalibrationSet:
    """Training numbers, of each length as often as held-out ones ask for it; each tenant answers
    them itself."""
    by_digits: dict[int, list[int]] = {}
    for n in training_numbers():
        by_digits.setdefault(len(str(n)), []).append(n)
    rng = random.Random(seed)
    digits = [d for d in sorted(by_digits) if d >= 3]
    return CalibrationSet.of(
        str(rng.choice(by_digits[digits[i % len(digits)]])) for i in range(count)
    )


def train_missing(material: Path, folder: str, seeds: Sequence[int]) -> None:
    """Train the seeds that are not there, each by a process on one core; what it prints goes to
    seedN.log.

    A seed's folder gets its name when all of its tenants are there. Raises TaskError.
    """
    if folder not in RECIPES:
        raise TaskError(f"--train knows no recipe for {folder!r}; it knows: {', '.join(RECIPES)}")
    module, *options = RECIPES[folder]
    waiting = [seed for seed in seeds if not (material / folder / f"seed{seed}").exists()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    running: dict[int | None, tuple[int, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for core in [c for c in cores if c not in running][: len(waiting)]:
                running[core] = (
                    (seed := waiting.pop(0)),
                    _start(material / folder, module, options, seed, core),
                )
            time.sleep(0.2)
            for core, (seed, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[core]
                path = material / folder / f"seed{seed}"
                if process.returncode:
                    raise TaskError(f"training {path} failed; {path}.log says why")
                path.with_name(path.name + ".partial").rename(path)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


def _start(
    folder: Path, module: str, options: list[str], seed: int, core: int | None
) -> subprocess.Popen[bytes]:
    partial_out = folder / f"seed{seed}.partial"
    shutil.rmtree(partial_out, ignore_errors=True)  # of a run that was stopped
    partial_out.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        module,
        *options,
        "--seed",
        str(seed),
        "--out",
        str(partial_out),
    ]
    print(f"training {folder.name}, seed {seed}: {' '.join(command[1:])}", flush=True)
    with (folder / f"seed{seed}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # before it has threads, which inherit it
    return process


def materials(args: argparse.Namespace) -> list[Material]:
    """Every number of tenants with every seed. Raises TaskError for a folder that is not there or
    not finished."""
    found = []
    for count in args.tenants:
        names = TEXTS if args.family == "text" else ALL_LANGUAGES
        if not 1 < count <= len(names):
            raise TaskError(f"--tenants {count}: {args.family} has 2 to {len(names)}")
        for seed in args.seeds:
            folder = args.material / (args.folder or args.family) / f"seed{seed}"
            tenants = {name: folder / name for name in names[:count]}
            missing = [str(p) for p in (folder / "base", *tenants.values()) if not p.is_dir()]
            if missing:
                raise TaskError(f"{missing[0]}: not there; --train makes it")
            if args.family == "text":
                texts = folder / "texts"
                tasks = {
                    name: Task.read(texts / f"{name}.heldout.jsonl", args.scored)
                    for name in tenants
                }
                calibration = {
                    name: CalibrationSet.read(texts / f"{name}.calibration.jsonl")
                    for name in tenants
                }
            else:
                judged = list(tenants)[:1] if args.family == "switch" else list(tenants)
                tasks = {name: number_task(name, args.scored or 500) for name in judged}
                calibration = {name: number_prompts(args.calibration, seed) for name in tenants}
            name = f"{args.folder or args.family}, {count} tenants"
            found.append(Material(tenants, tasks, folder / "base", calibration, name, seed))
    return found


def methods(args: argparse.Namespace, count: int) -> list[Method]:
    """Those asked for, else all; `base` for texts, where the paper's table has it."""
    if args.methods:
        return [Method.parse(m) for m in args.methods]
    first = [Method("base")] if args.family == "text" else []
    return first + usual_methods(args.extra or EXTRA.get(count, [0.15]), with_base=True)


def tenant_columns(results: Sequence[Result], metric: str, form: str) -> str:
    """A row a tenant, a column a method: the paper's form for perplexities."""
    each = by_method(results)
    lines = ["| | " + " | ".join(each) + " |", "|" + " --- |" * (len(each) + 1)]
    for tenant in results[0].tenants:
        cells = [
            cell([getattr(r.tenants[tenant], metric) for r in found], form)
            for found in each.values()
        ]
        lines.append(f"| {tenant} | " + " | ".join(cells) + " |")
    lines.append(
        "| experts' memory | "
        + " | ".join(cell([r.memory.share for r in f], ".1%") for f in each.values())
        + " |"
    )
    return "\n".join(lines)


def count_columns(groups: dict[str, list[Result]], metric: str, form: str) -> str:
    """A row a method, a column a number of variants: the paper's form for Switch. Extra memory
    differs by number."""
    columns = {name.split(", ")[1]: by_method(found) for name, found in groups.items()}
    labels: dict[str, None] = {}
    for found in columns.values():
        labels |= dict.fromkeys(found)
    lines = ["| | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for label in labels:
        cells = [
            cell([r.mean(metric) for r in found.get(label, ())], form) for found in columns.values()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(
    family: str, groups: dict[str, list[Result]], options: Options, folder: str | None = None
) -> str:
    """All tables as Markdown. folder: the material's, if it is not named like its family."""
    parts = [f"# Quality: {folder or family}", ""]
    if family == "switch":
        tenant = next(iter(next(iter(groups.values()))[0].tenants))
        for metric, form, what in (
            ("exact_match", ".1%", "exactly right"),
            ("rouge1", ".3f", "ROUGE-1"),
        ):
            parts += [f"## Tenant {tenant}, {what}, as more variants share the experts", ""]
            parts += [count_columns(groups, metric, form), ""]
    for name, results in groups.items():
        if family == "text":
            parts += [
                f"## {name}: perplexity of held-out text",
                "",
                tenant_columns(results, "perplexity", ".2f"),
                "",
            ]
        parts += [f"## {name}", "", markdown(results, provenance(), options, notes(results))]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--material", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--folder", metavar="NAME", help="in DIR, with seedN in it; default: the family's name"
    )
    parser.add_argument("--train", action="store_true", help="train what DIR does not hold yet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--tenants", type=int, nargs="+", help=f"how many share; default: {TENANTS}"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="as of `moetel eval`; default: all"
    )
    parser.add_argument(
        "--extra",
        type=float,
        nargs="+",
        help=f"shares for the policies; default by tenants: {EXTRA}",
    )
    parser.add_argument(
        "--scored",
        type=int,
        help="held-out numbers (default 500) or texts (default all) of a tenant",
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=96,
        help="training numbers that a tenant is calibrated on",
    )
    parser.add_argument(
        "--positions", type=int, default=Options().positions, help="compared at, of a tenant"
    )
    parser.add_argument("--scratch", type=Path, help="folder for stores, emptied again")
    parser.add_argument("--out", type=Path, metavar="DIR", help="tables, figures and plots")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.tenants = args.tenants or TENANTS[args.family]
    options = Options(max_new_tokens=96, positions=args.positions, scratch=args.scratch)
    groups: dict[str, list[Result]] = {}

    def keep(result: Result) -> None:
        group = groups.setdefault(result.material, [])
        group.append(result)
        print(
            f"{result.material}, seed {result.seed}: {result.method}: memory "
            f"{result.memory.share:.1%}, kept "
            f"{cell([result.mean('kept')], '.1%')}, worst {cell([result.worst('kept')], '.1%')} "
            f"({result.worst_tenant() or 'all alike'}), KL {cell([result.mean('kl')], '.2e')}; "
            f"built in {result.built_s:.0f} s, scored in {result.scored_s:.0f} s",
            flush=True,
        )
        if args.out:
            write(
                group,
                args.out / result.material.replace(", ", "-").replace(" ", "-"),
                options,
                result.material,
            )
            text = summary(args.family, groups, options, args.folder)
            (args.out / f"{args.folder or args.family}.md").write_text(text, encoding="utf-8")

    try:
        if args.train:
            train_missing(args.material, args.folder or args.family, args.seeds)
        for material in materials(args):
            evaluate(
                [material],
                methods(args, len(material.tenants)),
                options,
                keep,
                silent if args.quiet else bars,
            )
    except MoetelError as error:
        parser.exit(1, f"error: {error}\n")
    print(summary(args.family, groups, options, args.folder))
    return [result for found in groups.values() for result in found]


if __name__ == "__main__":
    main()
