"""Table, figures and files of an experiment with systems under load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from common import EngineError
from common.units import format_bytes
from scripts.load.experiment import Cell, Comparison
from scripts.load.traffic import TrafficError

COLUMNS = (
    "system",
    "requests/s",
    "load",
    "answered",
    "output tokens/s",
    "TTFT mean, p95, ms",
    "TPOT mean, ms",
    "E2EL mean, p95, ms",
    "goodput, requests/s",
    "Jain",
    "saturated",
)


def row(cell: Cell) -> list[str]:
    """A test as a row of `COLUMNS`."""
    r = cell.result
    flooded = "" if cell.flood is None else f", {cell.flood.tenant} x{cell.flood.factor:g}"
    goodput = r["request_goodput"]
    return [
        cell.system + flooded,
        f"{cell.request_rate:.3g}",
        "-" if cell.load is None else f"{cell.load:.0%}",
        f"{r['completed']} of {r['completed'] + r['failed']}",
        f"{r['output_throughput']:.1f}",
        f"{r['mean_ttft_ms']:.0f}, {r['p95_ttft_ms']:.0f}" if r["completed"] else "-",
        f"{r['mean_tpot_ms']:.1f}" if r["completed"] else "-",
        f"{r['mean_e2el_ms']:.0f}, {r['p95_e2el_ms']:.0f}" if r["completed"] else "-",
        "-" if goodput is None else f"{goodput:.3g}",
        f"{r['jain_index']:.3f}",
        "yes" if r["saturated"] else "",
    ]


def table(cells: Sequence[Cell]) -> Table:
    found = Table(title="each system at each rate; times from the planned arrival on")
    for name in COLUMNS:
        found.add_column(name, justify="left" if name == "system" else "right")
    for cell in cells:
        found.add_row(*row(cell))
    return found


def remarks(found: Comparison) -> list[str]:
    """Saturation rates, aims, the flood, and what went wrong."""
    lines = []
    if found.capacity:
        shown = ", ".join(f"{name} {rate:.3g}" for name, rate in found.capacity.items())
        lines.append(f"saturation, requests/s (closed loop): {shown}")
    held = [
        f"{n} {format_bytes(a['resident_bytes'])}"
        for n, a in found.systems.items()
        if a.get("resident_bytes")
    ]
    if held:
        lines.append(f"weights held: {', '.join(held)}")
    lines += [
        f"{name} failed: {about['error']}"
        for name, about in found.systems.items()
        if "error" in about
    ]
    for pair in found.pairs:
        shown = ", ".join(
            f"{n} {r['mean_e2el_ms']:.0f} ms (TTFT {r['mean_ttft_ms']:.0f}, TPOT "
            f"{r['mean_tpot_ms']:.1f})"
            for n, r in pair.items()
        )
        lines.append(f"in turn, mean E2EL: {shown}")
    lines += [*found.aims, *filter(None, [found.flood()])]
    for cell in found.cells:
        if compiled := cell.result.get("compilations"):
            at = f"{cell.system} at {cell.request_rate:.3g} requests/s"
            lines.append(
                f"{at}: {compiled} steps were compiled during the test, so it is slower than later "
                "ones"
            )
        for error, number in sorted(cell.result["errors"].items(), key=lambda e: -e[1])[:3]:
            lines.append(
                f"{cell.system} at {cell.request_rate:.3g} requests/s: {number} requests {error}"
            )
    return lines


def markdown(
    found: Comparison, about: Mapping[str, Any], options: Mapping[str, Any], title: str
) -> str:
    lines = [f"# {title}", "", f"{about['date']}, {about['machine']}; {about['versions']}", ""]
    lines += [f"`{about['command']}`", "", f"Options: {json.dumps(options, default=str)}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(cell)) + " |" for cell in found.cells]
    lines += ["", *(f"- {line}" for line in remarks(found)), ""]
    lines += ["Worst tenant of each test, by time for a token of its answers:", ""]
    lines += [
        "| system | requests/s | worst tenant | its E2EL mean, p95, ms |",
        "| --- | --- | --- | --- |",
    ]
    for cell in found.cells:
        name = cell.result["worst_tenant"]
        worst = cell.result["tenants"].get(name)
        times = (
            f"{worst['mean_e2el_ms']:.0f}, {worst['p95_e2el_ms']:.0f}"
            if worst and worst["completed"]
            else "-"
        )
        lines.append(f"| {row(cell)[0]} | {cell.request_rate:.3g} | {name} | {times} |")
    return "\n".join(lines) + "\n"


def write(
    found: Comparison,
    directory: Path,
    about: Mapping[str, Any],
    options: Mapping[str, Any],
    title: str,
    name: str,
) -> list[Path]:
    """NAME.json, NAME.md and, with matplotlib, NAME.png into a folder; gives those written. Raises
    TrafficError."""
    value = {
        "provenance": dict(about),
        "options": dict(options),
        "capacity": found.capacity,
        "systems": found.systems,
        "aims": found.aims,
        "results": [cell.to_json() for cell in found.cells],
        "pairs": found.pairs,
        "floods": found.floods,
    }
    paths = [directory / f"{name}.json", directory / f"{name}.md"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
        paths[1].write_text(markdown(found, about, options, title), encoding="utf-8")
        if _has_matplotlib():
            paths.append(directory / f"{name}.png")
            draw(found, paths[-1], title)
    except OSError as error:
        raise TrafficError(
            f"{directory}: cannot be written: {error}; choose another --out"
        ) from error
    return paths


# Okabe and Ito's colours, which colour-blind readers can tell apart; systems differ by marker and
# line as well.
STYLES = {
    "moetel": ("#0072B2", "o", "-"),
    "single": ("#000000", "s", "--"),
    "paper": ("#D55E00", "^", "-."),
    "partition": ("#009E73", "D", ":"),
    "time_sharing": ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))),
    "http": ("#0072B2", "o", "-"),
}

PANELS = (
    ("output_throughput", "output tokens/s"),
    ("mean_ttft_ms", "time to first token, mean, ms"),
    ("p95_ttft_ms", "time to first token, p95, ms"),
    ("mean_e2el_ms", "time to last token, mean, ms"),
    ("p95_e2el_ms", "time to last token, p95, ms"),
)


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(found: Comparison, path: Path, title: str) -> None:
    """Throughput and latencies against the rate of arrivals, a line a system. Raises EngineError
    without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise EngineError("the figure needs matplotlib; run: pip install 'moetel[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    panels = list(grid.flat)
    calm = [c for c in found.cells if c.flood is None and math.isfinite(c.request_rate)]
    names = list(dict.fromkeys(c.system for c in calm))
    handles: dict[str, Any] = {}
    for axes, (key, what) in zip(panels, PANELS, strict=False):
        for name in names:
            colour, marker, line = STYLES.get(name, ("#666666", "x", "-"))
            cells = sorted(
                (c for c in calm if c.system == name and c.result["completed"]),
                key=lambda c: c.request_rate,
            )
            x, y = [c.request_rate for c in cells], [c.result[key] for c in cells]
            (handles[name],) = axes.plot(
                x, y, color=colour, marker=marker, linestyle=line, linewidth=1.4, markersize=6
            )
            full = [(a, b) for a, b, c in zip(x, y, cells, strict=True) if c.result["saturated"]]
            if full:
                xs, ys = zip(*full, strict=True)
                style = {
                    "color": colour,
                    "marker": marker,
                    "markerfacecolor": "white",
                    "markersize": 6,
                    "zorder": 5,
                }
                axes.plot(xs, ys, linestyle="none", **style)
        if key != "output_throughput":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("arrivals, requests/s, all tenants")
        axes.set_ylabel(what)
        axes.set_xlim(left=0)
        axes.grid(color="#e4e4e4", linewidth=0.6, which="both")
        axes.set_axisbelow(True)
    panels[-1].axis("off")
    panels[-1].legend(
        [handles[n] for n in names],
        [
            f"{n} (saturates at {found.capacity[n]:.3g}/s)" if n in found.capacity else n
            for n in names
        ],
        loc="center",
        frameon=False,
        title="hollow: saturated; its times grow with\nthe length of the test",
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
