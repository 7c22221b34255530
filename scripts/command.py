"""What every command shares: parser, exit codes (0 done, 1 failed, 2 wrong usage), errors without a
traceback."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from common import MoetelError
from common.version import __version__


class Command(Protocol):
    """A module of this folder that is a command: its docstring's first line is its summary."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def path(text: str) -> Path:
    """A path, for argparse. `~` is the home directory, also where a shell leaves it, as in
    `NAME=~/model`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def fail(message: str) -> int:
    """Print an error on standard error; returns the exit code 1."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"error: {message}", style="bold red", markup=False
    )
    return 1


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; errors that Moetel raises on purpose become a message and exit code 1."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    try:
        return run(args)
    except MoetelError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return fail("interrupted")


def main(name: str, command: Command, argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m scripts.NAME`."""
    parser = argparse.ArgumentParser(prog=f"moetel {name}", description=command.__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    command.add_arguments(parser)
    return guarded(command.run, parser.parse_args(argv))
