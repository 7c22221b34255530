"""Train the demo tenants: a small Mixtral that spells numbers, and a fine-tune for each language.

The base is not told in which language, so it answers in any. Each fine-tune goes on from it with
all weights free and one language.

    python -m benchmarks.material.train_demo            # what examples/tenants holds
    python -m benchmarks.material.train_demo --preset ten --out /tmp/ten
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.material.mixtral import SPECIAL, Training, is_expert, make_model, moved, save, train
from benchmarks.material.recipe import add_recipe, given, write_metrics
from benchmarks.material.tokenizer import make_tokenizer
from common.progress import bars
from scripts import arguments
from scripts.demo.number_words import ALL_LANGUAGES, LANGUAGES, expected, training_numbers


@dataclass(frozen=True)
class Recipe(Training):
    """Everything that the result of this script depends on."""

    languages: tuple[str, ...] = LANGUAGES


# Recipes by name; options override their values.
PRESETS = {
    "demo": Recipe(),
    "ten": Recipe(
        vocab_size=768,
        batch=64,
        base_steps=1200,
        tune_steps=400,
        tune_lr=3e-3,
        languages=ALL_LANGUAGES,
    ),
}
PRESET_HELP = (
    "where the other defaults come from. demo: what examples/ holds, tenants that share experts at "
    "almost no loss; "
    "ten: ten languages from a base trained for less long, tuned hotter, so that experts move far "
    "apart and sharing "
    "them costs something"
)


def number_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """ "1234" becomes `<s> 1 2 3 4 <sep>`."""
    special = {**SPECIAL, "sep_token": "<sep>"}
    return make_tokenizer(texts, vocab_size, special, "<s> $A <sep>")


class Examples:
    """Prompts and answers as token ids, drawn in batches. Half of the draws favour short numbers,
    which are few."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, numbers: Sequence[int], languages: Sequence[str]
    ):
        self._tokenizer, self._numbers, self._languages = tokenizer, numbers, tuple(languages)
        self._eos = tokenizer.eos_token_id
        self._by_digits: dict[int, list[int]] = {}
        for i, n in enumerate(numbers):
            self._by_digits.setdefault(len(str(n)), []).append(i)

    def batch(self, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, int64 [size, longest]; labels are -100 at prompts and padding."""
        drawn = []
        for _ in range(size):
            pool = (
                self._by_digits[rng.choice(sorted(self._by_digits))]
                if rng.random() < 0.5
                else range(len(self._numbers))
            )
            number = self._numbers[rng.choice(pool)]
            drawn.append((number, self._languages[rng.randrange(len(self._languages))]))
        # Spelled only now: few of the numbers are ever drawn, and spelling all of them takes longer
        # than many steps.
        prompts = self._tokenizer([str(n) for n, _ in drawn])["input_ids"]
        answers = self._tokenizer([expected(*each) for each in drawn], add_special_tokens=False)[
            "input_ids"
        ]
        rows = [
            (prompt, [*answer, self._eos]) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        longest = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(size, longest, dtype=torch.int64)
        labels = torch.full((size, longest), -100, dtype=torch.int64)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return ids, labels


def run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train and save the base and every language's tenant; returns what goes to metrics.json."""
    started = time.perf_counter()
    numbers = training_numbers()
    tokenizer = number_tokenizer(
        [expected(n, lang) for lang in recipe.languages for n in numbers[::7]], recipe.vocab_size
    )
    base = make_model(recipe, tokenizer)
    sizes = {n: p.numel() for n, p in base.named_parameters()}
    losses: dict[str, list[float]] = {}
    distances = {}
    for name in ("base", *recipe.languages):
        is_base = name == "base"
        model = base if is_base else copy.deepcopy(base)
        examples = Examples(tokenizer, numbers, recipe.languages if is_base else [name])
        steps = recipe.base_steps if is_base else recipe.tune_steps
        lr = recipe.base_lr if is_base else recipe.tune_lr
        with bars(name, steps) as advance:
            losses[name] = train(
                model, examples, steps, recipe.batch, lr, recipe.seed + (not is_base), advance
            )
        save(model, tokenizer, out / name)
        if not is_base:
            distances[name] = moved(model, base)
    return write_metrics(
        out,
        recipe,
        losses,
        ("torch", "transformers", "tokenizers", "num2words"),
        tenants=distances,
        parameters=sum(sizes.values()),
        expert_parameters=sum(size for name, size in sizes.items() if is_expert(name)),
        training_s=round(time.perf_counter() - started),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = Path(__file__).resolve().parents[2] / "examples" / "tenants"
    parser.add_argument(
        "--out", type=arguments.path, default=default_out, help=f"default: {default_out}"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help=PRESET_HELP)
    add_recipe(parser, Recipe())
    parser.add_argument(
        "--languages", nargs="+", choices=ALL_LANGUAGES, help=f"default: {' '.join(LANGUAGES)}"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.preset != "demo" and args.out == default_out:
        parser.error(
            f"--preset {args.preset} needs --out: {default_out} holds what the default recipe makes"
        )
    torch.set_num_threads(args.threads)
    recipe = replace(PRESETS[args.preset], **given(args, Recipe()))
    run(replace(recipe, languages=tuple(recipe.languages)), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
