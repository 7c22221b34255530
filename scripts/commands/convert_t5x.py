"""Convert a T5X or Orbax checkpoint of a Switch Transformer into a Hugging Face directory."""

from __future__ import annotations

import argparse

from rich.console import Console

from common.checkpoints import find_arrays, open_checkpoint, read_asset, write_hugging_face
from common.checkpoints.staging import new_directory
from common.dtypes import common_dtype
from common.errors import CheckpointError
from common.progress import bars
from scripts import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=arguments.path,
        metavar="SRC",
        help="a T5X checkpoint_<step>, or an Orbax checkpoint",
    )
    parser.add_argument(
        "target",
        type=arguments.path,
        metavar="DST",
        help="a directory that does not exist or is empty",
    )
    parser.add_argument(
        "--config",
        type=arguments.path,
        metavar="config.json",
        help="what the arrays do not tell; a directory with config.json may be given, tokenizer "
        "files come along then "
        "(default: config.json in SRC if there is one, else T5's defaults)",
    )


def run(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.source, args.config)
    if find_arrays(args.source) is None:
        raise CheckpointError(
            f"{args.source}: a Hugging Face directory already; nothing to convert"
        )
    dtype = common_dtype(sorted({source.dtype for source in checkpoint.tensors.values()}))
    config = checkpoint.family.hf_config(checkpoint.config, dtype)
    with (
        new_directory(args.target) as partial,
        bars(f"converting {args.source}", len(checkpoint.tensors)) as advance,
    ):
        for name, asset in checkpoint.assets.items():
            if name != "config.json":
                (partial / name).write_bytes(read_asset(asset))
        write_hugging_face(partial, config, checkpoint.stream(), on_tensor=advance)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{args.target}: {checkpoint.family.name}, {len(checkpoint.tensors)} tensors, {dtype}",
        markup=False,
    )
    for note in checkpoint.notes:
        console.print(f"  {note}", markup=False)
    return 0
