"""Recipes of trainings as options of a command, and what a training leaves beside its tenants."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def add_recipe(parser: argparse.ArgumentParser, defaults: Any) -> None:
    """An option for each number that the recipe, a dataclass, holds; None where not given."""
    for name, value in asdict(defaults).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}"
            )


def given(args: argparse.Namespace, defaults: Any) -> dict[str, Any]:
    """The values that the command line gave for fields of a recipe."""
    found = {name: getattr(args, name, None) for name in asdict(defaults)}
    return {name: value for name, value in found.items() if value is not None}


def write_metrics(
    out: Path,
    recipe: Any,
    losses: Mapping[str, Sequence[float]],
    packages: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """metrics.json: the recipe, losses at the beginning and at the end, versions, and more."""
    metrics = {
        "date": date.today().isoformat(),
        "recipe": asdict(recipe),
        "first_loss": {name: sum(v[:5]) / len(v[:5]) for name, v in losses.items()},
        "last_loss": {name: sum(v[-20:]) / len(v[-20:]) for name, v in losses.items()},
        "versions": {name: version(name) for name in packages},
        **more,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics
