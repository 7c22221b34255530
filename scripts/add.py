"""Add a tenant to a store, and plan again with the settings that the store was built with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from common import add_tenant
from common.calibration import CalibrationSet
from common.progress import bars
from scripts import build, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--tenant", type=build.tenant, required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of a T5X or Orbax checkpoint")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="the tenant's typical prompts, JSONL; see build")


def run(args: argparse.Namespace) -> int:
    name, checkpoint = args.tenant
    examples = CalibrationSet.read(args.calibrate) if args.calibrate else None
    store = add_tenant(args.store, name, checkpoint, config=args.config, calibration=examples, progress=bars)
    build.report(store, Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(command.main("add", sys.modules[__name__]))
