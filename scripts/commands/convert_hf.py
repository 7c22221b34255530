"""Convert a Hugging Face directory of a Switch Transformer into a T5X or an Orbax checkpoint."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from rich.console import Console

from common.checkpoints import open_checkpoint, read_asset, write_orbax, write_t5x
from common.checkpoints.staging import new_directory
from common.errors import CheckpointError
from common.progress import bars
from scripts import arguments

WRITERS = {"t5x": write_t5x, "orbax": write_orbax}


def step(text: str) -> int:
    """A training step, for argparse: T5X keeps it as int32."""
    if not text.isdecimal() or int(text) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 to {(1 << 31) - 1}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=arguments.path, metavar="SRC", help="a Hugging Face directory"
    )
    parser.add_argument(
        "target",
        type=arguments.path,
        metavar="DST",
        help="a directory that does not exist or is empty; T5X finds checkpoints named "
        "checkpoint_<step>",
    )
    parser.add_argument("--to", choices=sorted(WRITERS), required=True, help="format to write")
    parser.add_argument(
        "--step", type=step, help="training step to write (default: that in DST's name, else 0)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: each array's own; float16, which T5X has not, becomes float32",
    )


def resolve_step(given: int | None, target: Path) -> int:
    """The step to write. Raises CheckpointError if it is not the one in the target's name."""
    match = re.fullmatch(r"checkpoint_(\d{1,9})", target.resolve().name)
    if match is None:
        return given or 0
    if given is not None and given != int(match[1]):
        raise CheckpointError(
            f"{target}: is named for step {int(match[1])}, but --step is {given}; make them agree"
        )
    return int(match[1])


def run(args: argparse.Namespace) -> int:
    number = resolve_step(args.step, args.target)
    checkpoint = open_checkpoint(args.source)
    with (
        new_directory(args.target) as partial,
        bars(f"converting {args.source}", len(checkpoint.tensors)) as advance,
    ):
        WRITERS[args.to](partial, checkpoint, step=number, dtype=args.dtype, on_tensor=advance)
        # Neither format has a place for the config; beside the arrays it disturbs neither, and
        # Moetel finds it there.
        (partial / "config.json").write_text(
            json.dumps(dict(checkpoint.config.raw), indent=2) + "\n", encoding="utf-8"
        )
        for name, asset in checkpoint.assets.items():
            if name != "config.json":
                (partial / name).write_bytes(read_asset(asset))
    Console(highlight=False, soft_wrap=True).print(
        f"{args.target}: {args.to}, step {number}, {len(checkpoint.tensors)} tensors with "
        "config.json",
        markup=False,
    )
    return 0
