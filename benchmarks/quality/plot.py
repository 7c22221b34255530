"""Quality against memory as a picture, and how planners' expectations rank beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import EngineError
from scripts.quality import report
from scripts.quality.report import Spread, by_method
from scripts.quality.scores import Result
from scripts.quality.task import DEFAULTS, Options, TaskError


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


def notes(results: Sequence[Result]) -> list[str]:
    """What a table of several plans says below it."""
    correlation = rank_correlation(results)
    if correlation is None:
        return []
    return [
        "divergence that planners expected beside that measured: rank correlation "
        f"{correlation[0]:.2f} over {correlation[1]} plans"
    ]


def write(
    results: Sequence[Result], directory: Path, options: Options = DEFAULTS, title: str = "Quality"
) -> None:
    """quality.json, quality.md and quality.png into a folder. Raises TaskError."""
    report.write(results, directory, options, title, notes(results))
    try:
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
