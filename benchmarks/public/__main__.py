"""What is left of public fine-tunes when they share experts, by EleutherAI's lm-eval.

    python -m benchmarks.public olmoe --folder DIR --tasks arc_easy hellaswag

The models of a set are fetched from the hub into DIR, which needs the network and room. For each
method a store is built, and each tenant is scored as it is served. Scores are kept in DIR as they
come, so a run that ended goes on where it stopped.

alone: each tenant with its own experts, which takes one model's memory a tenant.
average: one model, the plain mean of all weights.
round_robin: the paper's rule (arXiv 2505.06481).
bitdelta: the base's experts, with one bit a weight for each tenant (arXiv 2402.10193).
residual: `moetel build`, with --extra.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from benchmarks.public.bitdelta import build_bitdelta
from benchmarks.public.sets import SETS, PublicSet, fetch
from benchmarks.quality.merging import Recipe, merge
from common import CalibrationSet, MoetelError, Store, build_store
from common.progress import bars
from scripts import arguments
from scripts.provenance import provenance
from scripts.quality.lm_eval_model import MoetelLM

METHODS = ("alone", "average", "round_robin", "bitdelta", "residual")
Scores = dict[str, dict[str, dict[str, Any]]]
"""Method -> tenant -> task -> metric, value and standard error; `bytes` of a method's experts."""


def build(
    method: str, checkpoints: Mapping[str, Path], base: str, path: Path, args: argparse.Namespace
) -> Store:
    """The store that serves a method, built unless it is there."""
    if (path / "store.json").is_file():
        return Store.open(path)
    if method == "average":
        merged = path.with_name("average-checkpoint")
        if not merged.exists():
            merge(Recipe("average"), checkpoints, None, merged, progress=bars)
        return build_store(path, {"average": merged}, own_experts="reference", progress=bars)
    if method == "bitdelta":
        return build_bitdelta(path, checkpoints, base, bars)
    options: dict[str, Any] = {"policy": method}
    if method == "residual":
        calibration = {name: CalibrationSet.read(file) for name, file in args.calibrate}
        options |= {"extra": args.extra, "calibration": calibration}
    return build_store(path, checkpoints, own_experts="reference", progress=bars, **options)


def score(
    store: Store, tenant: str, alone: bool, known: TaskManager, args: argparse.Namespace
) -> dict[str, Any]:
    """Task -> its first metric, with its standard error."""
    model = MoetelLM(
        str(store.path), tenant, alone=alone, batch_size=args.batch_size, device=args.device
    )
    try:
        out = lm_eval.simple_evaluate(
            model=model,
            tasks=list(args.tasks),
            task_manager=known,
            limit=args.limit,
            batch_size=model.batch_size,
        )
    finally:
        model.engine.close()
    found = {}
    for task in args.tasks:
        results = out["results"][task]
        key = next(k for k in results if "," in k and "stderr" not in k)
        name, kind = key.split(",")
        found[task] = {
            "metric": name,
            "value": results[key],
            "stderr": results.get(f"{name}_stderr,{kind}"),
        }
    return found


def run(found: PublicSet, args: argparse.Namespace) -> Scores:
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = fetch(found, folder, dict(args.local))
    kept = folder / "scores.json"
    scores: Scores = json.loads(kept.read_text()) if kept.is_file() else {}
    known = TaskManager(include_path=str(args.include) if args.include else None)
    for method in args.methods:
        cells = scores.setdefault(method, {})
        missing = [
            name
            for name in checkpoints
            if any(task not in cells.get(name, {}) for task in args.tasks)
        ]
        if not missing:
            continue
        # Nothing is shared by a tenant alone: any store of all tenants will do.
        kind = "round_robin" if method == "alone" else method
        try:
            store = build(kind, checkpoints, found.base, folder / f"store-{kind}", args)
        except MoetelError as error:
            print(f"{method}: cannot be built: {error}", flush=True)
            continue
        for name in missing:
            tenant = "average" if method == "average" else name
            cells[name] = cells.get(name, {}) | score(store, tenant, method == "alone", known, args)
            one = store.experts.num_positions * store.copy_bytes
            extra = len(checkpoints) - 1 if method == "alone" else store.extra_bytes / one
            cells[name]["experts"] = {"metric": "memory", "value": 1 + extra, "stderr": None}
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(scores, indent=1))
            partial.replace(kept)
            print(f"{method}, {name}: {json.dumps(cells[name])}", flush=True)
    return scores


def table(title: str, scores: Scores, tenants: Sequence[str], tasks: Sequence[str]) -> str:
    """Markdown: a row a method and tenant, a column a task."""
    columns = ["method", "experts' memory", "tenant", *tasks]
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for method, cells in scores.items():
        for name in tenants:
            if name not in cells:
                continue
            row = [method, f"{cells[name]['experts']['value']:.1%}", name]
            for task in tasks:
                cell = cells[name].get(task)
                text = "-" if cell is None else f"{cell['value']:.4g}"
                if cell is not None and isinstance(cell["stderr"], float):
                    text += f" +- {cell['stderr']:.2g}"
                row.append(text)
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", json.dumps(provenance()), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--folder", type=arguments.path, required=True, help="for all that is made")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "hellaswag", "winogrande"])
    parser.add_argument("--include", type=arguments.path, help="a folder of lm-eval's task files")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--limit", type=int, help="questions a task; default: all")
    parser.add_argument("--extra", type=arguments.share, help="of `residual`, as 11%%")
    parser.add_argument(
        "--calibrate",
        type=arguments.tenant,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="typical prompts for `residual`",
    )
    parser.add_argument(
        "--local",
        type=arguments.tenant,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a tenant's checkpoint that is here already",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", default="auto")
    args = parser.parse_args(argv)
    found = SETS[args.set]
    scores = run(found, args)
    text = table(f"{args.set} by lm-eval", scores, list(found.tenants), args.tasks)
    (args.folder / "table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
