"""How fast is a store built, and in how much memory?

Two random tenants are written shard by shard; the build runs in a process of its own, whose growth
over its imports is reported. The floor is a plain copy of the same files, synced to the disk, in
the same run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Report,
    add_output,
    machine,
    seconds,
    write_output,
)
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import add_model, shape_of

BUILD = """
import sys, time
from pathlib import Path
from common import build_store

def peak():  # in bytes; getrusage would inherit the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak()
begun = time.perf_counter()
build_store(sys.argv[1], {"a": sys.argv[2], "b": sys.argv[3]}, policy="round_robin")
print(time.perf_counter() - begun, peak() - before)
"""


def copy_all(files: list[Path], target: Path) -> None:
    """Read every file and write it to `target`, each synced to the disk, as a store's objects
    are."""
    target.mkdir()
    for number, path in enumerate(files):
        with open(path, "rb") as source, open(target / str(number), "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 24)
            copy.flush()
            os.fsync(copy.fileno())
    shutil.rmtree(target)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    add_output(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--scratch", help="folder for the checkpoints and the store (four times a checkpoint)"
    )
    args = parser.parse_args(argv)
    shape = shape_of(args)
    report = Report(
        "Building a store of two tenants",
        ("run", "copy, GB/s", "build, GB/s", "build / copy", "memory grown, MB"),
    )
    report.note(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        for seed, name in enumerate(("a", "b")):
            write_random(root / name, shape.config, "bfloat16", seed)
        files = sorted(root.glob("*/*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        spec = shape.parsed.experts
        tensor = spec.hidden_size * spec.intermediate_size * 2
        report.note(
            f"{size / 1e9:.2f} GB in two bfloat16 checkpoints; the largest expert tensor has "
            f"{tensor / 1e6:.1f} MB"
        )
        for run in range(args.repeats):
            copy = size / seconds(lambda: copy_all(files, root / "copy"))
            command = [
                sys.executable,
                "-c",
                BUILD,
                str(root / f"store{run}"),
                str(root / "a"),
                str(root / "b"),
            ]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            build = size / float(out[0])
            report.add(
                **{
                    "run": run,
                    "copy, GB/s": f"{copy / 1e9:.2f}",
                    "build, GB/s": f"{build / 1e9:.2f}",
                    "build / copy": f"{build / copy:.2f}",
                    "memory grown, MB": f"{float(out[1]) / 1e6:.0f}",
                }
            )
    write_output(args, [report], "Building a store")
    return report.rows


if __name__ == "__main__":
    main()
