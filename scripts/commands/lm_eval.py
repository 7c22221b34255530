"""Run EleutherAI's lm-eval with tenants of stores as models: lm-eval's own options, and `--model
moetel`.

    moetel lm-eval --model moetel --model_args store=STORE,tenant=NAME --tasks hellaswag
    --batch_size 8

Further --model_args: alone=True (the tenant with all its own experts), dtype, device, max_length,
max_gen_toks, add_bos_token; see `scripts.lm_eval_adapter.MoetelLM`. lm-eval looks for models in its
own package alone, so its plain command does not know this one.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys

from common import EngineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # All that follows is lm-eval's, its options and --help included: nothing begins with this
    # character.
    parser.prefix_chars = "\0"
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="what lm-eval takes; --help lists it"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise EngineError(
            f"lm-eval is not installed ({error}); run: pip install 'moetel[lm-eval]'"
        ) from error
    importlib.import_module("scripts.quality.lm_eval_model")  # registers the model
    # Its bootstrap of standard errors and its table writer fork; a copy of a process in which torch
    # or jax has threads can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    method, before = multiprocessing.get_start_method(), sys.argv
    multiprocessing.set_start_method("spawn", force=True)
    sys.argv = ["lm-eval", *args.arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
        multiprocessing.set_start_method(method, force=True)
    return 0
