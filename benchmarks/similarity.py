"""Distances between two tenants' experts: bytes a second and peak memory, on checkpoints larger
than memory's bound.

Two random tenants are written shard by shard; the distances are measured in a process of their own,
whose growth over its imports is reported beside its bound (a tensor of each tenant a thread). The
floor is reading the same files into a reused buffer with as many threads, in the same run; what was
just written comes from the page cache on both sides, unless it is larger than memory.
`benchmarks.store_build` measures the whole build.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    Report,
    Shape,
    Spread,
    add_output,
    add_shape,
    machine,
    ratios,
    seconds,
    shape_of,
    write_output,
    write_random,
)

MEASURE = """
import sys, time
from pathlib import Path
from common.plan import distance
from common.checkpoints import open_checkpoint

def peak():  # in bytes; getrusage would inherit the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

tenants = [(path, open_checkpoint(path)) for path in sys.argv[2:]]
before = peak()
begun = time.perf_counter()
distance.measure(tenants, workers=int(sys.argv[1]))
print(time.perf_counter() - begun, peak() - before)
"""

SHAPE = Shape(num_hidden_layers=6)  # 2.1 GB of experts in both tenants
READ_BYTES = 1 << 22


def read_all(files: list[Path], workers: int) -> None:
    """Read every byte of the files, each by one thread, into one buffer a file."""

    def one(path: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, files))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape(parser, SHAPE)
    add_output(parser)
    parser.add_argument(
        "--gigabytes", type=float, help="experts of both tenants; sets the number of layers"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", help="folder for the checkpoints")
    args = parser.parse_args(argv)
    shape = shape_of(args)
    if args.gigabytes is not None:
        layer = 2 * 2 * shape.num_local_experts * shape.expert_weights  # two tenants, two bytes
        shape = replace(shape, num_hidden_layers=max(1, round(args.gigabytes * 1e9 / layer)))
    columns = (
        "threads",
        "read, GB/s",
        "distances, GB/s",
        "distances / read",
        "memory grown, MB",
        "bound, MB",
    )
    report = Report("Distances between two tenants", columns)
    report.note(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        for seed, name in enumerate(("a", "b")):
            write_random(root / name, shape, torch.bfloat16, seed)
        files = sorted(root.glob("*/*.safetensors"))
        on_disk = sum(f.stat().st_size for f in files)
        compared = 2 * 2 * shape.num_hidden_layers * shape.num_local_experts * shape.expert_weights
        tensor = shape.hidden_size * shape.intermediate_size * 2
        report.note(
            f"{on_disk / 1e9:.2f} GB in two bfloat16 checkpoints, {compared / 1e9:.2f} GB of it "
            "experts"
        )
        for workers in args.workers:
            read, measured, grown = [], [], []
            for repeat in range(args.repeats + 1):
                read_s = seconds(lambda: read_all(files, workers))  # noqa: B023
                command = [
                    sys.executable,
                    "-c",
                    MEASURE,
                    str(workers),
                    str(root / "a"),
                    str(root / "b"),
                ]
                out = subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.split()
                if repeat:  # the first round warms up
                    read.append(on_disk / read_s)
                    measured.append(compared / float(out[0]))
                    grown.append(float(out[1]))
            report.add(
                **{
                    "threads": workers,
                    "read, GB/s": Spread.of(read).scaled(1e-9),
                    "distances, GB/s": Spread.of(measured).scaled(1e-9),
                    "distances / read": ratios(measured, read),
                    "memory grown, MB": Spread.of(grown).scaled(1e-6),
                    "bound, MB": f"{2 * workers * tensor / 1e6:.1f}",
                }
            )
    write_output(args, [report], "Distances between tenants")
    return report.rows


if __name__ == "__main__":
    main()
