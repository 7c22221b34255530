"""The console command `moetel`: `moetel build`, `moetel plan`, ...; also `python -m scripts.cli`.

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from rich.console import Console

from common import MoetelError
from common.version import __version__

COMMANDS = {
    "build": "build a store from checkpoints",
    "plan": "compare budgets for a store; plan it anew",
    "add": "add a tenant to a store",
    "remove": "remove a tenant from a store",
    "inspect": "show tenants, distances, plan and memory of a store",
    "verify": "check every file of a store against its checksum",
    "generate": "answer a prompt as a tenant",
    "serve": "serve a store over HTTP, with OpenAI's routes",
    "keys": "make API keys for the server",
    "bench": "load-test tenants, and compare ways to serve them",
    "eval": "measure quality against device memory",
    "lm-eval": "run EleutherAI's lm-eval on a tenant",
    "convert_t5x": "T5X or Orbax checkpoint to Hugging Face",
    "convert_hf": "Hugging Face checkpoint to T5X or Orbax",
    "pack": "write a store with only what serving needs",
    "export": "write a tenant, as served, as a Hugging Face checkpoint",
}

MODULES = {"inspect": "inspect_store", "lm-eval": "lm_eval"}
"""Commands whose module in `scripts.commands` has another name."""


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


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The parser of all commands, and the module of each."""
    parser = argparse.ArgumentParser(
        prog="moetel",
        description="Serve many fine-tuned Mixture-of-Experts models from one shared set of "
        "experts.",
    )
    parser.add_argument("--version", action="version", version=f"moetel {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, summary in COMMANDS.items():
        modules[name] = module = importlib.import_module(
            f"scripts.commands.{MODULES.get(name, name)}"
        )
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    return parser, modules


def main(argv: Sequence[str] | None = None) -> int:
    parser, modules = make_parser()
    args = parser.parse_args(argv)
    return guarded(modules[args.command].run, args)


if __name__ == "__main__":
    sys.exit(main())
