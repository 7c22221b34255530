"""What sharing costs the shipped tenants, both engines, in one table: each tenant alone and with
shared experts, with weights in float32 and in bfloat16, and how many greedy answers the two types
agree on.

A score is the share of held-out numbers that a tenant spells exactly right.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Report, add_output, machine, write_output
from common import SamplingParams, build_store, load_engine
from common.build.examples import CalibrationSet
from scripts.demo.__main__ import EXAMPLES, FAMILIES
from scripts.demo.number_words import LANGUAGES, expected, held_out

COLUMNS = ("family", "engine", "tenant", "sharing", "float32", "bfloat16", "kept", "tokens agree")


def answers(store: Any, dtype: str, numbers: list[int]) -> tuple[str, list[Any]]:
    """The engine's device and every tenant's greedy answers, tenant by tenant."""
    requests = [(tenant, str(number)) for tenant in LANGUAGES for number in numbers]
    with load_engine(store, dtype=dtype) as engine:
        found = engine.generate_batch(requests, SamplingParams(max_new_tokens=96))
        return str(engine.stats()["device"]), found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    parser.add_argument(
        "--numbers", type=int, default=1000, help="held-out numbers that a score counts"
    )
    parser.add_argument("--family", choices=(*FAMILIES, "both"), default="both")
    args = parser.parse_args(argv)
    report = Report("Scores of the shipped tenants before and after consolidation", COLUMNS)
    report.note(machine())
    report.note(
        f"{args.numbers} held-out numbers; paper: one copy a position, the paper's rule; default: "
        "the default policy, "
        "calibrated on training numbers; kept: share of the score alone"
    )
    examples = CalibrationSet.read(EXAMPLES / "calibration.jsonl")
    ways: dict[str, dict[str, Any]] = {
        "alone": {"slots": "all"},
        "paper": {"policy": "round_robin"},
        "default": {"calibration": dict.fromkeys(LANGUAGES, examples)},
    }
    numbers = held_out(args.numbers)
    for family in FAMILIES if args.family == "both" else (args.family,):
        alone: dict[str, float] = {}
        for sharing, options in ways.items():
            with tempfile.TemporaryDirectory() as scratch:
                tenants = {lang: FAMILIES[family][0] / lang for lang in LANGUAGES}
                store = build_store(Path(scratch) / "store", tenants, **options)
                wide, narrow = (answers(store, dtype, numbers) for dtype in ("float32", "bfloat16"))
            for i, tenant in enumerate(LANGUAGES):
                part = slice(i * len(numbers), (i + 1) * len(numbers))
                scores = [
                    sum(
                        a.text == expected(n, tenant)
                        for a, n in zip(found[part], numbers, strict=True)
                    )
                    / len(numbers)
                    for _, found in (wide, narrow)
                ]
                alone.setdefault(tenant, scores[0])
                same = sum(
                    a.token_ids == b.token_ids
                    for a, b in zip(wide[1][part], narrow[1][part], strict=True)
                ) / len(numbers)
                report.add(
                    family=store.family.name,
                    engine=f"{'torch' if family == 'mixtral' else 'jax'}, {wide[0]}",
                    tenant=tenant,
                    sharing=sharing,
                    float32=f"{scores[0]:.1%}",
                    bfloat16=f"{scores[1]:.1%}",
                    kept=f"{scores[0] / alone[tenant]:.1%}",
                    **{"tokens agree": f"{same:.1%}"},
                )
    write_output(args, [report], "Scores of the shipped tenants")
    return report.rows


if __name__ == "__main__":
    main()
