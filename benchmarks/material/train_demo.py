"""Train the demo tenants: a small Mixtral that spells numbers, and a fine-tune for each language.

The base is not told in which language, so it answers in any. Each fine-tune goes on from it with
all weights free and one language. Training and scores use Hugging Face's Mixtral alone.

    python -m benchmarks.material.train_demo            # what examples/tenants holds
    python -m benchmarks.material.train_demo --preset ten --out /tmp/ten
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from common.progress import bars
from scripts import arguments
from scripts.demo.number_words import ALL_LANGUAGES, LANGUAGES, expected, held_out, training_numbers

PAD, BOS, EOS, SEP = "<pad>", "<s>", "</s>", "<sep>"


@dataclass(frozen=True)
class Training:
    """What the result depends on, whatever the texts. Sizes as in MixtralConfig; learning rates are
    peaks."""

    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    vocab_size: int = 512
    batch: int = 128
    base_steps: int = 3000
    tune_steps: int = 400
    base_lr: float = 4e-3
    tune_lr: float = 1e-3
    seed: int = 0


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


def make_tokenizer(
    texts: Iterable[str], vocab_size: int, template: str = f"{BOS} $A {SEP}"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts. template: what a text becomes, as `TemplateProcessing` spells
    it.

    Over the spelled numbers digits stay single, and "1234" becomes `<s> 1 2 3 4 <sep>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, SEP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in (BOS, SEP)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[SEP],
        clean_up_tokenization_spaces=False,
    )


class Batches(Protocol):
    """What `train` learns from."""

    def batch(self, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, int64 [size, longest]; labels are -100 where nothing is to be
        learnt."""


class Examples:
    """Prompts and answers as token ids, drawn in batches. Half of the draws favour short numbers,
    which are few."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, numbers: Sequence[int], languages: Sequence[str]
    ):
        self._tokenizer, self._numbers, self._languages = tokenizer, numbers, tuple(languages)
        self._eos = tokenizer.convert_tokens_to_ids(EOS)
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


def train(
    model: MixtralForCausalLM,
    examples: Batches,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    advance: Callable[[], None],
) -> list[float]:
    """AdamW with a short warm-up and a cosine to zero; all weights. Returns each step's loss
    (labelled tokens only)."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup,
            0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))),
        ),
    )
    model.train()
    losses = []
    for _ in range(steps):
        ids, labels = examples.batch(batch, rng)
        out = model(input_ids=ids, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        balance = _load_balance(
            out.router_logits, model.config.num_local_experts, model.config.num_experts_per_tok
        )
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        advance()
    return losses


def _load_balance(
    router_logits: Sequence[torch.Tensor], num_experts: int, top_k: int
) -> torch.Tensor:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, section 2.2), mean over layers: 1 if
    all share evenly."""
    total = torch.zeros(())
    for logits in router_logits:
        probabilities = logits.softmax(dim=-1)
        chosen = F.one_hot(logits.topk(top_k, dim=-1).indices, num_experts).float().mean(dim=(0, 1))
        total = total + num_experts * (chosen * probabilities.mean(dim=0)).sum()
    return total / len(router_logits)


@torch.inference_mode()
def score(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    language: str,
    numbers: Sequence[int],
) -> float:
    """Share of numbers spelled exactly right by greedy generation."""
    model.eval()
    right = 0
    # Rows of one prompt length need no padding.
    for digits in sorted({len(str(n)) for n in numbers}):
        group = [n for n in numbers if len(str(n)) == digits]
        ids = torch.tensor(tokenizer([str(n) for n in group])["input_ids"])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(text == expected(n, language) for text, n in zip(texts, group, strict=True))
    return right / len(numbers)


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def moved(model: MixtralForCausalLM, base: MixtralForCausalLM) -> dict[str, float]:
    """Relative L2 distance from the base: of all expert weights together, and of all others."""
    found = {}
    for kind, wanted in (("experts", True), ("non_experts", False)):
        pairs = [
            (p, q)
            for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True)
            if is_expert(n) == wanted
        ]
        distance = math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in pairs))
        found[kind] = distance / math.sqrt(sum(float(q.detach().square().sum()) for _, q in pairs))
    return found


def round_robin_owners(tenants: Sequence[MixtralForCausalLM]) -> list[list[int]]:
    """Owner of each [layer][expert] by the paper's rule (arXiv 2505.06481, Algorithm 1), every
    position resident.

    Written apart from `common.plan.plan`, so that the scores reported here do not rest on the
    code they judge.
    """
    layers, experts = len(tenants[0].model.layers), tenants[0].config.num_local_experts
    places = []
    for layer in range(layers):
        for expert in range(experts):
            flat = [
                torch.cat(
                    [
                        getattr(m.model.layers[layer].mlp.experts, p).data[expert].flatten()
                        for p in ("gate_up_proj", "down_proj")
                    ]
                )
                for m in tenants
            ]
            total = sum(
                float((a.double() - b.double()).norm())
                for i, a in enumerate(flat)
                for b in flat[i + 1 :]
            )
            places.append((total, layer, expert))
    owners = [[0] * experts for _ in range(layers)]
    for i, (_, layer, expert) in enumerate(sorted(places)):
        owners[layer][expert] = i % len(tenants)
    return owners


def shared(
    tenants: Sequence[MixtralForCausalLM], index: int, owners: list[list[int]]
) -> MixtralForCausalLM:
    """A tenant with every expert replaced by its position's owner's; all else its own."""
    model = copy.deepcopy(tenants[index])
    for layer, row in enumerate(owners):
        for expert, owner in enumerate(row):
            for projection in ("gate_up_proj", "down_proj"):
                source = getattr(tenants[owner].model.layers[layer].mlp.experts, projection)
                getattr(model.model.layers[layer].mlp.experts, projection).data[expert] = (
                    source.data[expert]
                )
    return model


def average(tenants: Sequence[MixtralForCausalLM]) -> MixtralForCausalLM:
    """The plain average of all weights."""
    model = copy.deepcopy(tenants[0])
    for target, *sources in zip(
        model.parameters(), *(m.parameters() for m in tenants), strict=True
    ):
        target.data = torch.stack([s.data for s in sources]).mean(dim=0)
    return model


def make_model(recipe: Training, tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    torch.manual_seed(recipe.seed)
    pad, bos, eos = (tokenizer.convert_tokens_to_ids(t) for t in (PAD, BOS, EOS))
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        num_local_experts=recipe.experts,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = MixtralForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    return model


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a checkpoint as the hub holds them: classic names, bfloat16."""
    path.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def load(path: Path) -> MixtralForCausalLM:
    """Read a checkpoint back, in float32 (the values are those of bfloat16)."""
    return MixtralForCausalLM.from_pretrained(path, dtype=torch.float32)


def run(recipe: Recipe, out: Path, num_scored: int, console: Console) -> dict[str, Any]:
    """Train, save, score; returns what goes to metrics.json."""
    started = time.perf_counter()
    numbers = training_numbers()
    console.print(f"{len(numbers)} numbers to train on, {num_scored} held out for scores")
    tokenizer = make_tokenizer(
        [expected(n, lang) for lang in recipe.languages for n in numbers[::7]], recipe.vocab_size
    )
    base = make_model(recipe, tokenizer)
    parameters = {n: p.numel() for n, p in base.named_parameters()}
    experts = sum(count for n, count in parameters.items() if is_expert(n))
    console.print(
        f"{sum(parameters.values())} parameters, {experts / sum(parameters.values()):.0%} of them "
        "experts"
    )
    losses = {}
    with bars("base", recipe.base_steps) as advance:
        examples = Examples(tokenizer, numbers, recipe.languages)
        losses["base"] = train(
            base, examples, recipe.base_steps, recipe.batch, recipe.base_lr, recipe.seed, advance
        )
    save(base, tokenizer, out / "base")
    for language in recipe.languages:
        model = copy.deepcopy(base)
        examples = Examples(tokenizer, numbers, [language])
        with bars(language, recipe.tune_steps) as advance:
            losses[language] = train(
                model,
                examples,
                recipe.tune_steps,
                recipe.batch,
                recipe.tune_lr,
                recipe.seed + 1,
                advance,
            )
        save(model, tokenizer, out / language)
    trained_s = time.perf_counter() - started
    metrics = evaluate(out, recipe.languages, num_scored, console)
    metrics |= {
        "date": date.today().isoformat(),
        "recipe": asdict(recipe),
        "parameters": sum(parameters.values()),
        "expert_parameters": experts,
        "last_loss": {
            name: sum(values[-20:]) / len(values[-20:]) for name, values in losses.items()
        },
        "training_s": round(trained_s),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "tokenizers", "num2words")
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def evaluate(
    out: Path, languages: Sequence[str], num_scored: int, console: Console
) -> dict[str, Any]:
    """Scores of the saved checkpoints: each alone, with shared experts, and the plain average of
    all weights.

    With more than four tenants, the first four are also scored as they share experts among
    themselves alone.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / languages[0])
    base, tenants = load(out / "base"), [load(out / language) for language in languages]
    numbers = held_out(num_scored)
    groups = {"": len(tenants)} | ({"_of_4": 4} if len(tenants) > 4 else {})
    owners = {name: round_robin_owners(tenants[:size]) for name, size in groups.items()}
    means = {name: average(tenants[:size]) for name, size in groups.items()}
    rows: dict[str, Any] = {}
    with bars("scoring", len(languages)) as advance:
        for i, language in enumerate(languages):
            distance = moved(tenants[i], base)
            row = {
                "base": score(base, tokenizer, language, numbers),
                "alone": score(tenants[i], tokenizer, language, numbers),
            }
            for name, size in groups.items():
                if i < size:
                    sharing = shared(tenants, i, owners[name])
                    row[f"shared_round_robin{name}"] = score(sharing, tokenizer, language, numbers)
                    row[f"plain_average{name}"] = score(means[name], tokenizer, language, numbers)
            row["relative_l2_experts"] = distance["experts"]
            row["relative_l2_non_experts"] = distance["non_experts"]
            rows[language] = row
            advance()
    titles = {"base": "base", "alone": "alone"}
    for name, size in groups.items():
        titles |= {
            f"shared_round_robin{name}": f"experts of {size}",
            f"plain_average{name}": f"average of {size}",
        }
    titles |= {"relative_l2_experts": "experts moved", "relative_l2_non_experts": "others moved"}
    table = Table(title=f"{num_scored} held-out numbers, exactly right", title_justify="left")
    for title in ("tenant", *titles.values()):
        table.add_column(title, justify="right")
    for language, row in rows.items():
        table.add_row(language, *(f"{row[key]:.1%}" if key in row else "" for key in titles))
    console.print(table)
    return {"held_out_numbers": num_scored, "tenants": rows}


def wide_console() -> Console:
    """A console that, where it writes to a file, cuts no table."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = Path(__file__).resolve().parent.parent / "examples" / "tenants"
    parser.add_argument(
        "--out", type=arguments.path, default=default_out, help=f"default: {default_out}"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help=PRESET_HELP)
    add_recipe(parser, Recipe())
    parser.add_argument(
        "--languages", nargs="+", choices=ALL_LANGUAGES, help=f"default: {' '.join(LANGUAGES)}"
    )
    parser.add_argument(
        "--scored", type=int, default=1000, help="held-out numbers that scores count"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.preset != "demo" and args.out == default_out:
        parser.error(
            f"--preset {args.preset} needs --out: {default_out} holds what the default recipe makes"
        )
    torch.set_num_threads(args.threads)
    recipe = replace(PRESETS[args.preset], **given(args, Recipe()))
    run(replace(recipe, languages=tuple(recipe.languages)), args.out, args.scored, wide_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
