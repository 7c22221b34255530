"""Tables, plots and files of quality as measured, with the machine and versions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from common import EngineError
from common.units import format_bytes
from scripts.provenance import provenance
from scripts.quality.measure import DEFAULTS, Options, Result, TaskError


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


def rank_correlation(results: Sequence[Result]) -> tuple[float, int] | None:
    """Spearman's correlation, and its number of plans, of what planners expected with the
    divergence measured.

    Means over tenants; of several materials the mean correlation. None below three plans a
    material.
    """
    found, plans = [], 0
    for key in sorted({(r.material, r.seed) for r in results}):
        pairs = [
            (sum(r.expected[t] for t in r.tenants) / len(r.tenants), kl)
            for r in results
            if (r.material, r.seed) == key and r.expected and (kl := r.mean("kl")) is not None
        ]
        if len(pairs) >= 3:
            ranks = [
                np.argsort(np.argsort(values)).astype(float) for values in zip(*pairs, strict=True)
            ]
            found.append(float(np.corrcoef(ranks[0], ranks[1])[0, 1]))
            plans += len(pairs)
    return (sum(found) / len(found), plans) if found else None


def markdown(results: Sequence[Result], about: Mapping[str, Any], options: Options) -> str:
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
    correlation = rank_correlation(results)
    if correlation is not None:
        lines.append(
            "- divergence that planners expected beside that measured: rank correlation "
            f"{correlation[0]:.2f} over "
            f"{correlation[1]} plans"
        )
    if len(seeds) > 1:
        lines.append("- mean over seeds (smallest to largest)")
    return "\n".join(lines) + "\n"


def write(
    results: Sequence[Result], directory: Path, options: Options = DEFAULTS, title: str = "Quality"
) -> None:
    """quality.json, quality.md and, with matplotlib, quality.png into a folder. Raises
    TaskError."""
    about = provenance()
    shown = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "scratch"}
    value = {"provenance": about, "options": shown, "results": [r.to_json() for r in results]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "quality.json").write_text(
            json.dumps(value, indent=1) + "\n", encoding="utf-8"
        )
        text = f"# {title}\n\n" + markdown(results, about, options)
        (directory / "quality.md").write_text(text, encoding="utf-8")
        draw(results, directory / "quality.png", title)
    except OSError as error:
        raise TaskError(f"{directory}: cannot be written: {error}; choose another --out") from error


# Methods are told apart by marker and filling as well as by colour.
MARKERS = "os^Dv<>pPXdh8*"
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
LINES = ("-", "--", ":", "-.")


PANELS = (
    ("mean of the tenants (dots: each of them)", "score kept, share of the tenant's alone"),
    ("worst tenant", None),
    ("mean of the tenants", "divergence from the tenant alone, nats a token"),
)


@dataclass(frozen=True)
class _Point:
    """One method in a plot: memory, a value for each panel, over seeds; dots: what each tenant
    kept."""

    share: float
    values: tuple[Spread | None, ...]
    dots: list[float]


def _points(results: Sequence[Result]) -> dict[str, list[_Point]]:
    """Methods as lines: the same policy with more and more extra memory is one."""
    lines: dict[str, list[_Point]] = {}
    for label, each in by_method(results).items():
        if label == "alone":
            continue
        # On a scale of logarithms there is no zero.
        divergence = [None if (kl := r.mean("kl")) is None else max(kl, 1e-8) for r in each]
        values = ([r.mean("kept") for r in each], [r.worst("kept") for r in each], divergence)
        share = sum(r.memory.share for r in each) / len(each)
        dots = [s.kept for r in each for s in r.tenants.values() if s.kept is not None]
        lines.setdefault(re.sub(r" \+ [\d.]+ %", "", label), []).append(
            _Point(share, tuple(map(Spread.of, values)), dots)
        )
    return {label: sorted(points, key=lambda p: p.share) for label, points in lines.items()}


def _range(lines: Mapping[str, list[_Point]]) -> tuple[float, float]:
    """Ends of the memory axis."""
    shares = [p.share for points in lines.values() for p in points] or [1.0]
    room = max(0.05, 0.1 * (max(shares) - min(shares)))
    return min(shares) - room, max(shares) + room


def _side_by_side(lines: Mapping[str, list[_Point]], panel: int) -> dict[tuple[str, int], float]:
    """How far to move each point along the memory axis so that points at one place can all be
    seen."""
    low, high = _range(lines)
    width = high - low
    near: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for label, points in lines.items():
        for i, point in enumerate(points):
            value = point.values[panel]
            if value is not None:
                height = np.log10(value.mean) * 8 if panel == 2 else value.mean * 25
                near.setdefault((round(point.share / width * 40), round(float(height))), []).append(
                    (label, i)
                )
    return {
        key: (place - (len(group) - 1) / 2) * 0.016 * width
        for group in near.values()
        for place, key in enumerate(group)
    }


def draw(results: Sequence[Result], path: Path, title: str = "Quality") -> None:
    """Against memory: the score kept, mean of the tenants and worst tenant, and the mean
    divergence.

    Bars reach from the smallest to the largest of several seeds. Raises EngineError without
    matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise EngineError("the plot needs matplotlib; run: pip install 'moetel[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    lines = _points(results)
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.8), sharex=True, layout="constrained")
    panels[1].sharey(panels[0])
    moved = [_side_by_side(lines, panel) for panel in range(3)]
    handles = []
    for number, (label, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        style: dict[str, Any] = {
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 7,
            "markerfacecolor": "white" if number % 2 else colour,
            "markeredgecolor": colour,
            "color": colour,
            "linestyle": LINES[number % len(LINES)] if len(points) > 1 else "none",
            "linewidth": 1.2,
        }
        handles.append(Line2D([], [], label=label, **style))
        for panel, axes in enumerate(panels):
            found = [(i, p, v) for i, p in enumerate(points) if (v := p.values[panel]) is not None]
            if not found:
                continue
            x = [p.share + moved[panel][label, i] for i, p, _ in found]
            bars = [[v.mean - v.low for _, _, v in found], [v.high - v.mean for _, _, v in found]]
            several = any(v.count > 1 for _, _, v in found)
            y = [v.mean for _, _, v in found]
            axes.errorbar(
                x, y, yerr=bars if several else None, capsize=3, elinewidth=0.9, zorder=3, **style
            )
            if panel == 0:
                dots = [(a, kept) for a, (_, p, _) in zip(x, found, strict=True) for kept in p.dots]
                axes.scatter(*zip(*dots, strict=True), s=7, color="#888888", zorder=2, linewidths=0)
    alone = next((r.memory.share for r in results if r.method == "alone"), None)
    if alone is not None:
        text = f"alone (all together: {alone:.0%} memory)"
        handles.append(
            Line2D([], [], color="black", linewidth=0.9, linestyle=(0, (1, 2)), label=text)
        )
    for axes, (what, unit) in zip(panels, PANELS, strict=True):
        axes.set_title(what, fontsize="medium")
        axes.set_xlabel("device memory for experts, share of one model's")
        axes.set_xlim(*_range(lines))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        if unit:
            axes.set_ylabel(unit)
    for axes in panels[:2]:
        axes.axhline(1.0, color="black", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if any(p.values[2] for points in lines.values() for p in points):
        panels[2].set_yscale("log")
    figure.suptitle(f"{title}; points at one place stand side by side", fontsize="medium")
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
