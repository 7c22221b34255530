"""Train the Switch demo tenants of examples/, and any tenant of your own, in Flax and optax.

The base learns to spell numbers out without being told in which language; each fine-tune goes on
from the base with all weights free and one language.

    python -m benchmarks.material.train_switch_demo  # what examples/tenants/switch holds
    python -m benchmarks.material.train_switch_demo --preset ten --out /tmp/ten
    python -m benchmarks.material.train_switch_demo --from CHECKPOINT --pairs FILE.tsv --out DIR

With --from and --pairs it is the example of a fine-tune of your own: CHECKPOINT is anything that
`moetel build` takes (Hugging Face, T5X, Orbax) with a tokenizer beside it; each line of the file is
a prompt, a tab, an answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.material.recipe import add_recipe, given, write_metrics
from benchmarks.material.switch import (
    Pairs,
    Recipe,
    make_config,
    make_model,
    moved,
    save,
    train,
)
from benchmarks.material.tokenizer import make_tokenizer
from common import MoetelError
from common.checkpoints import open_checkpoint
from common.progress import bars
from jax_engine.models.checkpoints import canonical_tensors, load_model
from scripts import arguments
from scripts.cli import fail
from scripts.demo.number_words import ALL_LANGUAGES, LANGUAGES, expected, training_numbers

# Recipes by name; options override their values.
PRESETS = {
    "demo": Recipe(),
    "ten": Recipe(
        vocab_size=768,
        batch=64,
        base_steps=5000,
        tune_steps=500,
        tune_lr=3e-3,
        languages=ALL_LANGUAGES,
    ),
}
PRESET_HELP = (
    "where the other defaults come from. demo: what examples/ holds, tenants that share experts at "
    "almost no loss; "
    "ten: ten languages, tuned hotter, so that experts move far apart and sharing "
    "them costs something"
)


def number_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """An end mark follows every text, as in T5."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return make_tokenizer(texts, vocab_size, special, "$A </s>")


def run(recipe: Recipe, out: Path) -> None:
    """Train and save the base and every language's tenant, write metrics.json."""
    started = time.perf_counter()
    numbers = training_numbers()
    texts = [expected(n, language) for language in recipe.languages for n in numbers[::7]]
    tokenizer = number_tokenizer(texts, recipe.vocab_size)
    config = make_config(recipe, len(tokenizer))
    base = make_model(config, recipe.seed)
    sizes = {name: array.size for name, array in canonical_tensors(base, config)}
    losses: dict[str, list[float]] = {}
    distances = {}
    for name in ("base", *recipe.languages):
        is_base = name == "base"
        # A fine-tune begins with what users have, rounded to bfloat16.
        model = base if is_base else load_model(open_checkpoint(out / "base"))
        spelled = recipe.languages if is_base else (name,)
        pairs = Pairs(tokenizer, [(str(n), [expected(n, s) for s in spelled]) for n in numbers])
        steps = recipe.base_steps if is_base else recipe.tune_steps
        lr = recipe.base_lr if is_base else recipe.tune_lr
        with bars(name, steps) as advance:
            losses[name] = train(
                model, pairs, steps, recipe.batch, lr, recipe.seed + (not is_base), advance
            )
        save(model, config, tokenizer, out / name)
        if not is_base:
            mine, theirs = (dict(canonical_tensors(m, config)) for m in (model, base))
            distances[name] = moved(mine, theirs)
    write_metrics(
        out,
        recipe,
        losses,
        ("jax", "flax", "optax", "transformers", "tokenizers", "num2words"),
        tenants=distances,
        parameters=sum(sizes.values()),
        expert_parameters=sum(size for name, size in sizes.items() if ".experts." in name),
        training_s=round(time.perf_counter() - started),
    )


def tune(
    source: Path, pairs_file: Path, out: Path, steps: int, batch: int, lr: float, seed: int
) -> list[float]:
    """Fine-tune all weights of a checkpoint on a file of `prompt TAB answer` lines. Raises
    MoetelError."""
    checkpoint = open_checkpoint(source)
    if checkpoint.family.name != "switch_transformers":
        raise MoetelError(
            f"{source}: a {checkpoint.family.name} checkpoint; this script trains Switch "
            "Transformers"
        )
    if "tokenizer_config.json" not in checkpoint.assets:
        raise MoetelError(
            f"{source}: no tokenizer beside the weights; put tokenizer.json and "
            "tokenizer_config.json there"
        )
    lines = pairs_file.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise MoetelError(f"{pairs_file}: line {number} is not a prompt, one tab and an answer")
    if not pairs:
        raise MoetelError(f"{pairs_file}: no line with a prompt, a tab and an answer")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    model = load_model(checkpoint)
    with bars(f"tuning {source.name}", steps) as advance:
        drawn = Pairs(tokenizer, [(prompt, [answer]) for prompt, answer in pairs])
        losses = train(model, drawn, steps, batch, lr, seed, advance)
    save(model, checkpoint.config, tokenizer, out)
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = Path(__file__).resolve().parents[2] / "examples" / "tenants" / "switch"
    parser.add_argument(
        "--out", type=arguments.path, default=default_out, help=f"default: {default_out}"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=arguments.path,
        help="fine-tune this checkpoint instead (with --pairs)",
    )
    parser.add_argument("--pairs", type=arguments.path, help="file of `prompt TAB answer` lines")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help=PRESET_HELP)
    add_recipe(parser, Recipe())
    parser.add_argument(
        "--languages", nargs="+", choices=ALL_LANGUAGES, help=f"default: {' '.join(LANGUAGES)}"
    )
    args = parser.parse_args(argv)
    if (args.source is None) != (args.pairs is None):
        parser.error("--from and --pairs go together")
    if args.preset != "demo" and args.out == default_out:
        parser.error(
            f"--preset {args.preset} needs --out: {default_out} holds what the default recipe makes"
        )
    recipe = replace(PRESETS[args.preset], **given(args, Recipe()))
    recipe = replace(recipe, languages=tuple(recipe.languages))
    console = Console()
    try:
        if args.source:
            r = recipe
            losses = tune(
                args.source, args.pairs, args.out, r.tune_steps, r.batch, r.tune_lr, r.seed
            )
            console.print(
                f"{args.out}: tuned; cross-entropy {losses[0]:.3f} at first, {losses[-1]:.3f} at "
                "last"
            )
        else:
            run(recipe, args.out)
    except MoetelError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
