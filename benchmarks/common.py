"""What benchmarks share: statistics, tables, the machine's description and rates."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def ratios(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times as fast the second is, pair by pair of neighbouring measurements."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


@dataclass
class Report:
    """Rows of a table, printed as they come, and written as Markdown or JSON."""

    title: str
    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{name}: {row[name]}" for name in self.columns), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
            lines += [
                "| " + " | ".join(str(row[c]) for c in self.columns) + " |" for row in self.rows
            ]
            lines.append("")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])

    def to_json(self) -> dict[str, Any]:
        rows = [
            {k: v.__dict__ if isinstance(v, Spread) else v for k, v in row.items()}
            for row in self.rows
        ]
        return {"title": self.title, "notes": self.notes, "rows": rows}


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")


def write_output(args: argparse.Namespace, reports: Sequence[Report], heading: str) -> None:
    if args.json:
        args.json.write_text(json.dumps([r.to_json() for r in reports], indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join([f"# {heading}", "", *(r.markdown() for r in reports)]))


def machine() -> str:
    """Processor, cores, threads, memory, versions, date."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    import transformers

    return (
        f"{date.today()}, {name}, {os.cpu_count()} cores ({', '.join(wide)}), "
        f"{torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


def peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


Clock = Callable[[], float]


def take_clock(parser: argparse.ArgumentParser) -> None:
    """An option for machines that other work shares; see `clock_of`."""
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU's time: other work counts less",
    )


def clock_of(args: argparse.Namespace) -> Clock:
    """What to measure with. Sets torch to one thread for CPU time, as waiting threads would spend
    it, too."""
    if not args.cpu_time:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def seconds(call: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def memory_bandwidth(
    size_bytes: int = 1 << 30,
    repeats: int = 9,
    clock: Clock = time.perf_counter,
    device: str = "cpu",
) -> float:
    """Bytes a second of a plain read by all threads (a sum over more than the caches hold): the
    best of several."""
    data = torch.ones(size_bytes // 4, device=device)
    data.sum()
    return size_bytes / min(seconds(lambda: _read(data.sum()), clock) for _ in range(repeats))


def matmul_rate(
    dtype: torch.dtype, size: int, clock: Clock = time.perf_counter, device: str = "cpu"
) -> float:
    """Operations a second of a square product of this size, torch's best."""
    a = torch.randn(size, size, device=device).to(dtype)
    # Not torch.mm: in bfloat16 it takes minutes on processors that do not multiply the type.
    times = (seconds(lambda: _read(torch.nn.functional.linear(a, a)), clock) for _ in range(4))
    return 2 * size**3 / min(times)


def _read(result: torch.Tensor) -> float:
    """One entry of it, for which a device must have computed it."""
    return float(result.reshape(-1)[0])
