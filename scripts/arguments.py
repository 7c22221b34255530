"""Flags and types of flags that several commands share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from common import RequestError
from common.bounds import COUNT, Bound, bound_of
from common.build.examples import CalibrationSet
from common.build.sources import TENANT_NAME
from common.units import parse_bytes

T = TypeVar("T")


def path(text: str) -> Path:
    """A path, for argparse. `~` is the home directory, also behind `NAME=`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def tenant(text: str) -> tuple[str, Path]:
    """`NAME=CHECKPOINT`, for argparse."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write NAME=CHECKPOINT, for example fr=checkpoints/french"
        )
    return name, path(value)


def base(text: str) -> tuple[str | None, Path]:
    """`PATH`, or `NAME=PATH` for one tenant, for argparse."""
    name, equals, value = text.partition("=")
    if equals and value and TENANT_NAME.fullmatch(name):
        return name, path(value)
    return None, path(text)


def slots(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, or all") from None


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """`15%` or `0.15`, for argparse. A plain number above 1 is more likely a forgotten % than many
    models' worth."""
    percent = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a share of one model's expert bytes, as 15% or 0.15"
        )
    if value > 1 and not percent:
        raise argparse.ArgumentTypeError(
            f"{text!r} is {value:.0%} of one model's expert bytes; write {text}% or "
            f"{value / 100:g} for a hundredth of "
            f"that, {value:.0%} if you mean it"
        )
    return value


def calibration(text: str) -> tuple[str, CalibrationSet]:
    """`NAME=FILE.jsonl`, for argparse."""
    name, file = tenant(text)
    try:
        return name, CalibrationSet.read(file)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def traffic(text: str) -> tuple[str, float]:
    """`NAME=WEIGHT`, for argparse."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=WEIGHT, for example fr=3") from None


def number(bound: Bound) -> Callable[[str], float]:
    """A number within a bound, for argparse."""

    def parse(text: str) -> float:
        try:
            value: float = int(text) if bound.whole else float(text)
        except ValueError:
            value = math.nan
        if not bound.allows(value):
            raise argparse.ArgumentTypeError(f"{text!r}: {replace(bound, optional=False).words}")
        return value

    return parse


def add_option(
    parser: argparse._ActionsContainer, options: type, name: str, text: str, flag: str | None = None
) -> None:
    """A flag for a number that is an option of a dataclass, with its bound and default.

    Args:
        flag: the flag's name, if it is not the option's.
    """
    bound = bound_of(options, name)
    parser.add_argument(
        f"--{flag or name.replace('_', '-')}",
        type=number(bound),
        default=getattr(options, name),
        metavar="N" if bound.whole else "X",
        help=text,
    )


whole = number(COUNT)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, from 0")
    return value


def named(convert: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """`NAME=VALUE`, for argparse."""

    def parse(text: str) -> tuple[str, T]:
        name, equals, value = text.partition("=")
        try:
            if not equals or not name:
                raise ValueError
            return name, convert(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: write NAME=NUMBER, for example fr=2"
            ) from None

    return parse


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What planning can be told, beside how much memory there is."""
    parser.add_argument(
        "--calibrate",
        type=calibration,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a tenant's typical prompts, a few hundred: JSONL lines of prompt (and answer) or "
        "text; repeat",
    )
    parser.add_argument(
        "--traffic",
        type=traffic,
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help="how many requests a tenant has where one that is not named has one; default: all the "
        "same",
    )


def add_engine_arguments(parser: argparse._ActionsContainer) -> None:
    """Where a store's engine runs and in what type it computes."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def port(text: str) -> int:
    """For argparse."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port, 0 to 65535; 0 takes a free one")
    return int(text)


def texts(text: str) -> tuple[str, ...]:
    """`["a", "b"]` as vLLM's flags take it, or one text alone, for argparse."""
    if not text.startswith("["):
        return (text,)
    try:
        found = json.loads(text)
    except ValueError:
        found = [None]
    if not all(isinstance(each, str) for each in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give a JSON list of texts, or one text")
    return tuple(found)
