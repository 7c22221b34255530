"""Tables and files of quality as measured, with the machine and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.units import format_bytes
from scripts.provenance import provenance
from scripts.quality.scores import Result
from scripts.quality.task import DEFAULTS, Options, TaskError


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each method in order, one for each material."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    return found


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest over materials (seeds)."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        found = [v for v in values if v is not None]
        return cls(sum(found) / len(found), min(found), max(found), len(found)) if found else None

    def text(self, form: str) -> str:
        """`form` is a format specification; the range is left out where all values look the
        same."""
        one, low, high = (format(value, form) for value in (self.mean, self.low, self.high))
        return one if low == high else f"{one} ({low} to {high})"


def cell(values: Sequence[float | None], form: str) -> str:
    """Text of a table's cell, empty if there is no value."""
    spread = Spread.of(values)
    return "" if spread is None else spread.text(form)


SCORE_FORMS = {
    "exact_match": ("exact match", ".1%"),
    "rouge1": ("ROUGE-1", ".3f"),
    "rougeL": ("ROUGE-L", ".3f"),
    "perplexity": ("perplexity", ".3f"),
    "word_perplexity": ("perplexity a word", ".1f"),
    "bits_per_byte": ("bits a byte", ".4f"),
}


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row a method; over several seeds mean (smallest to largest)."""
    first = results[0]
    metrics = {s.metric for r in results for s in r.tenants.values() if s.metric}
    titles = ["method", "expert memory, of one model's", "kept, mean", "kept, worst tenant"]
    titles += ["KL, mean", "KL, worst", "top-1 agrees", "top-1, worst"]
    shown = [m for m in SCORE_FORMS if m in metrics]
    tenants = list(first.tenants)
    titles += [f"{SCORE_FORMS[m][0]}, {t}" for m in shown for t in tenants]
    rows = []
    for method, each in by_method(results).items():
        worst = sorted({w for r in each if (w := r.worst_tenant())})
        row = [
            method,
            cell([r.memory.share for r in each], ".1%"),
            cell([r.mean("kept") for r in each], ".1%"),
            cell([r.worst("kept") for r in each], ".1%")
            + (f", {'/'.join(worst)}" if worst else ""),
            cell([r.mean("kl") for r in each], ".2e"),
            cell([r.worst("kl") for r in each], ".2e"),
            cell([r.mean("top1") for r in each], ".2%"),
            cell([r.worst("top1") for r in each], ".2%"),
        ]
        for metric in shown:
            form = SCORE_FORMS[metric][1]
            row += [
                cell([getattr(r.tenants[t], metric) for r in each if t in r.tenants], form)
                for t in tenants
            ]
        rows.append(row)
    return titles, rows


def markdown(
    results: Sequence[Result],
    about: Mapping[str, Any],
    options: Options,
    notes: Sequence[str] = (),
) -> str:
    """The table with what it was made from and how."""
    titles, rows = table(results)
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    seeds = sorted({r.seed for r in results})
    memory = results[-1].memory
    counts = ", ".join(
        f"{name}: {s.questions} questions, {s.tokens} tokens of text, {s.positions} positions "
        "compared"
        for name, s in results[0].tenants.items()
    )
    lines += [
        "",
        f"- {about['date']}, {about['machine']}; "
        + ", ".join(f"{name} {value}" for name, value in about["versions"].items()),
        f"- `{about['command']}`",
        f"- {results[0].material or 'material'}, seeds {', '.join(map(str, seeds))}; {counts}",
        "- experts of one model: "
        f"{format_bytes(memory.experts + memory.residuals - memory.extra)}, one tenant's other "
        f"layers: {format_bytes(memory.other)}",
        "- kept: score as served / score alone (of perplexities: alone / served); KL: mean over "
        "positions of "
        "KL(alone || served), nats a token, along the "
        + ("tenant's own greedy answers" if options.forced == "own" else "given answers")
        + " or the text",
    ]
    lines += [f"- {note}" for note in notes]
    if len(seeds) > 1:
        lines.append("- mean over seeds (smallest to largest)")
    return "\n".join(lines) + "\n"


def write(
    results: Sequence[Result],
    directory: Path,
    options: Options = DEFAULTS,
    title: str = "Quality",
    notes: Sequence[str] = (),
) -> None:
    """quality.json and quality.md into a folder. Raises TaskError."""
    about = provenance()
    shown = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "scratch"}
    value = {"provenance": about, "options": shown, "results": [r.to_json() for r in results]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "quality.json").write_text(
            json.dumps(value, indent=1) + "\n", encoding="utf-8"
        )
        text = f"# {title}\n\n" + markdown(results, about, options, notes)
        (directory / "quality.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise TaskError(f"{directory}: cannot be written: {error}; choose another --out") from error
