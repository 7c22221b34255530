"""Train tenants whose texts really differ: a small Mixtral on encyclopaedia text, three fine-tunes
on other kinds.

--texts names the folder with wikitext2_validation.txt, wikitext2_test.txt, ptb_validation.txt and
ptb_test.txt; `texts.py` says what each tenant is trained on. With --base-on-all the base sees all
of it in equal parts, as bases that people fine-tune have seen a bit of everything.

    python -m benchmarks.material.train_text --out /tmp/text --texts FOLDER
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.material.mixtral import SPECIAL, Training, is_expert, make_model, moved, save, train
from benchmarks.material.recipe import add_recipe, given, write_metrics
from benchmarks.material.texts import Mixture, Windows, pieces, read_texts, spread, write_lines
from benchmarks.material.tokenizer import make_tokenizer
from common import MoetelError
from common.progress import bars
from scripts import arguments
from scripts.cli import fail


@dataclass(frozen=True)
class Recipe(Training):
    """Everything that the result depends on beside the texts. context: tokens of a training row,
    BOS included."""

    hidden_size: int = 128
    intermediate_size: int = 256
    vocab_size: int = 3072
    batch: int = 16
    base_steps: int = 900
    tune_steps: int = 400
    base_lr: float = 2e-3
    tune_lr: float = 1.5e-3
    context: int = 128
    max_characters: int = 2_000_000
    heldout_tokens: int = 30_000
    calibration_tokens: int = 5_000
    base_on_all: bool = False


def run(recipe: Recipe, folder: Path, out: Path) -> dict[str, Any]:
    """Train and save; returns what goes to metrics.json. Raises MoetelError."""
    started = time.perf_counter()
    texts = read_texts(folder, recipe.max_characters)
    # Equal shares, so that no tenant's words are spelled in bytes.
    share = min(500_000, *(sum(map(len, t.training)) for t in texts.values()))
    tokenizer = make_tokenizer(
        [
            part
            for t in texts.values()
            for part in "\n".join(t.training)[:share].splitlines(keepends=True)
        ],
        recipe.vocab_size,
        {**SPECIAL, "sep_token": "<sep>"},
        "<s> $A",
    )
    for tenant, its in texts.items():
        heldout = spread(
            tokenizer, pieces(tokenizer, its.heldout, recipe.context), recipe.heldout_tokens
        )
        calibration = spread(
            tokenizer, pieces(tokenizer, its.training, recipe.context), recipe.calibration_tokens
        )
        write_lines(out / "texts" / f"{tenant}.heldout.jsonl", heldout)
        write_lines(out / "texts" / f"{tenant}.calibration.jsonl", calibration)
    base = make_model(recipe, tokenizer)
    sizes = {n: p.numel() for n, p in base.named_parameters()}
    losses: dict[str, list[float]] = {}
    distances = {}
    windows = {
        tenant: Windows(tokenizer, its.training, recipe.context) for tenant, its in texts.items()
    }
    num_tokens = {tenant: its.num_tokens for tenant, its in windows.items()}
    for tenant, own in windows.items():
        is_base = tenant == "base"
        model = base if is_base else copy.deepcopy(base)
        steps, lr, seed = (
            (recipe.base_steps, recipe.base_lr, recipe.seed)
            if is_base
            else (recipe.tune_steps, recipe.tune_lr, recipe.seed + 1)
        )
        shown = Mixture(list(windows.values())) if is_base and recipe.base_on_all else own
        with bars(tenant, steps) as advance:
            losses[tenant] = train(model, shown, steps, recipe.batch, lr, seed, advance)
        save(model, tokenizer, out / tenant)
        if not is_base:
            distances[tenant] = moved(model, base)
    return write_metrics(
        out,
        recipe,
        losses,
        ("torch", "transformers", "tokenizers"),
        tenants=distances,
        training_tokens=num_tokens,
        parameters=sum(sizes.values()),
        expert_parameters=sum(size for name, size in sizes.items() if is_expert(name)),
        training_s=round(time.perf_counter() - started),
    )


def default_texts() -> Path:
    """Folder of the texts: below $MOETEL_SHARED, else below shared/ beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    return Path(os.environ.get("MOETEL_SHARED") or beside) / "data" / "text"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=arguments.path, required=True)
    parser.add_argument(
        "--texts", type=arguments.path, default=default_texts(), help=f"default: {default_texts()}"
    )
    add_recipe(parser, Recipe())
    parser.add_argument(
        "--base-on-all",
        action="store_true",
        help="train the base on the other tenants' texts as well",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        run(replace(Recipe(), **given(args, Recipe())), args.texts, args.out)
    except MoetelError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
