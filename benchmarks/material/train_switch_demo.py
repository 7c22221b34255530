"""Train the Switch demo tenants of examples/, and any tenant of your own, in Flax and optax.

The base learns to spell numbers out without being told in which language; each fine-tune goes on
from the base with all weights free and one language. Scores are those of Hugging Face's Switch
Transformer on the files written.

    python -m benchmarks.material.train_switch_demo  # what examples/tenants/switch holds
    python -m benchmarks.material.train_switch_demo --preset ten --out /tmp/ten
    python -m benchmarks.material.train_switch_demo --from CHECKPOINT --pairs FILE.tsv --out DIR
With --from and --pairs it is the example of a fine-tune of your own: CHECKPOINT is anything that
`moetel build` takes (Hugging Face, T5X, Orbax) with a tokenizer beside it; each line of the file is
a prompt, a tab, an answer.
"""

from __future__ import annotations

import os
import sys

if not __package__:
    # Run as a file, Python puts this folder first on its path, where our inspect.py would stand in
    # for the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common import MoetelError
from common.checkpoints import open_checkpoint, write_hugging_face
from common.dtypes import BFLOAT16
from common.families.switch_transformers import as_switch
from common.progress import bars
from jax_engine.experts.dispatch import DenseDispatch
from jax_engine.experts.products import PlainProducts
from jax_engine.models.encoder_decoder import Expert, Initial, Settings, SwitchTransformer
from jax_engine.tenants.weights import canonical_tensors, family, load_model
from scripts import arguments
from scripts.cli import fail
from scripts.demo.number_words import ALL_LANGUAGES, LANGUAGES, expected, held_out, training_numbers

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on. Sizes as in SwitchTransformersConfig; learning rates
    are peaks."""

    d_model: int = 64
    d_kv: int = 16
    d_ff: int = 128
    heads: int = 4
    layers: int = 4
    experts: int = 8
    vocab_size: int = 512
    batch: int = 128
    base_steps: int = 3000
    tune_steps: int = 400
    base_lr: float = 4e-3
    tune_lr: float = 1e-3
    seed: int = 0
    languages: tuple[str, ...] = LANGUAGES


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


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the spelled numbers; digits stay single, and an end mark follows every
    text, as in T5."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Batch:
    """prompts int32 [B, S], answers int32 [B, T] (the end mark included), 0 at padding."""

    prompts: np.ndarray
    answers: np.ndarray


class Pairs:
    """Prompts and answers as token ids, drawn in batches of one shape. Half of the draws favour
    short prompts.

    A number's answer is drawn anew each time if there are several.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, Sequence[str]]]
    ):
        self._prompts = tokenizer([p for p, _ in pairs])["input_ids"]
        self._answers = [tokenizer(list(answers))["input_ids"] for _, answers in pairs]
        self._shape = tuple(
            -(-max(map(len, rows)) // 8) * 8
            for rows in (self._prompts, [a for each in self._answers for a in each])
        )
        self._by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(self._prompts):
            self._by_length.setdefault(len(prompt), []).append(i)

    def batch(self, size: int, rng: random.Random) -> Batch:
        found = Batch(*(np.zeros((size, n), np.int32) for n in self._shape))
        lengths = sorted(self._by_length)
        for row in range(size):
            short = rng.random() < 0.5
            i = (
                rng.choice(self._by_length[rng.choice(lengths)])
                if short
                else rng.randrange(len(self._prompts))
            )
            prompt, answer = self._prompts[i], rng.choice(self._answers[i])
            found.prompts[row, : len(prompt)], found.answers[row, : len(answer)] = prompt, answer
        return found


def loss(
    model: SwitchTransformer, prompts: jax.Array, answers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the answers' tokens, plus 0.01 of the routers' load-balancing loss; and
    the former alone.

    Load balance: Switch Transformers (arXiv 2101.03961), section 2.2, mean over layers; 1 if
        experts share evenly.
    """
    config = model.settings.config
    spec = config.experts
    slot_of = jnp.tile(jnp.arange(spec.num_experts, dtype=jnp.int32), (spec.num_layers, 1))
    balance: list[jax.Array] = []

    def feed(block: Any, x: jax.Array, live: jax.Array) -> jax.Array:
        if block.layer is not None:
            probabilities = jax.nn.softmax(block.router.logits(block.ff_norm(x)), axis=-1)
            chosen = jax.nn.one_hot(probabilities.argmax(axis=-1), spec.num_experts)
            share, mean = (
                (v * live[..., None]).sum(axis=(0, 1)) / live.sum() for v in (chosen, probabilities)
            )
            balance.append(spec.num_experts * (share * mean).sum())
        found: jax.Array = block.feed(x, slot_of, live, ())
        return found

    live = prompts != 0
    x, bias = model.embed("encoder", prompts), model.bias_of_encoder(live)
    for block in model.encoder:
        x = feed(block, block.encode(x, bias), live)
    encoded = model.encoded(x)
    answer_live = answers != 0
    start = jnp.full((len(answers), 1), config.decoder_start_token_id, answers.dtype)
    x = model.embed("decoder", jnp.concatenate([start, answers[:, :-1]], axis=1))
    zero, length = jnp.int32(0), answers.shape[1]
    bias, encoder_bias = model.bias_of_decoder(zero, length, length), model.bias_to_encoder(live)
    for block, cache, theirs in zip(
        model.decoder, model.new_cache(len(answers), length), encoded, strict=True
    ):
        x, _ = block.decode(x, bias, cache, zero, theirs, encoder_bias)
        x = feed(block, x, answer_live)
    each = optax.softmax_cross_entropy_with_integer_labels(
        model.logits(x, config.vocab_size), answers
    )
    entropy = (each * answer_live).sum() / answer_live.sum()
    total: jax.Array = entropy + 0.01 * jnp.stack(balance).mean()
    return total, entropy


@lru_cache
def adamw(steps: int, lr: float) -> optax.GradientTransformation:
    """AdamW with a short warm-up and a cosine to zero. One object for equal arguments, as `step`
    compiles for each."""
    warmup = max(1, min(100, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(lr / warmup, lr, warmup, max(steps, warmup + 1))
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )


@nnx.jit
def step(model: Any, optimizer: Any, prompts: jax.Array, answers: jax.Array) -> Any:
    """One update of all weights, in place. Returns the cross-entropy."""
    every = nnx.DiffState(0, nnx.Any(nnx.Param, Expert))
    (_, entropy), grads = nnx.value_and_grad(loss, argnums=every, has_aux=True)(
        model, prompts, answers
    )
    optimizer.update(model, grads)
    return entropy


def train(
    model: SwitchTransformer,
    pairs: Pairs,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    advance: Callable[[], None],
) -> list[float]:
    """AdamW, all weights, in place. Returns each step's cross-entropy."""
    optimizer = nnx.Optimizer(model, adamw(steps, lr), wrt=nnx.Any(nnx.Param, Expert))
    rng = random.Random(seed)
    losses = []
    for _ in range(steps):
        drawn = pairs.batch(batch, rng)
        losses.append(
            step(model, optimizer, jnp.asarray(drawn.prompts), jnp.asarray(drawn.answers))
        )
        advance()
    return [float(v) for v in losses]


def make_model(recipe: Recipe, vocab_size: int) -> SwitchTransformer:
    """Random weights in the shape of a recipe: every second layer sparse on both sides, tied,
    ReLU."""
    raw = {
        "model_type": "switch_transformers",
        "vocab_size": vocab_size,
        "d_model": recipe.d_model,
        "d_kv": recipe.d_kv,
        "d_ff": recipe.d_ff,
        "num_heads": recipe.heads,
        "num_layers": recipe.layers,
        "num_decoder_layers": recipe.layers,
        "num_sparse_encoder_layers": recipe.layers // 2,
        "num_sparse_decoder_layers": recipe.layers // 2,
        "num_experts": recipe.experts,
        "expert_capacity": 64,
        "dense_act_fn": "relu",
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 64,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = as_switch(family().parse_config(raw, "recipe"))
    slots = (config.experts.num_experts,) * config.experts.num_layers
    s = Settings(config, PlainProducts("float32", "float32"), DenseDispatch(), slots, vocab_size)
    return SwitchTransformer(s, Initial(recipe.seed))


def save(model: SwitchTransformer, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16."""
    path.mkdir(parents=True, exist_ok=True)
    config = model.settings.config
    tensors = ((name, array.astype(BFLOAT16)) for name, array in canonical_tensors(model))
    write_hugging_face(path, family().hf_config(config, "bfloat16"), tensors)
    ids = {k: config.raw.get(k) for k in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    (path / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(path)


def score(
    model: Any, tokenizer: PreTrainedTokenizerBase, language: str, numbers: Sequence[int]
) -> float:
    """Share of numbers that a Hugging Face Switch Transformer, greedy, spells exactly right."""
    import torch

    right = 0
    with torch.inference_mode():
        # Rows of one prompt length need no padding.
        for digits in sorted({len(str(n)) for n in numbers}):
            group = [n for n in numbers if len(str(n)) == digits]
            ids = torch.tensor(tokenizer([str(n) for n in group])["input_ids"])
            out = model.generate(input_ids=ids, max_new_tokens=80, do_sample=False)
            texts = tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)
            right += sum(
                text == expected(n, language) for text, n in zip(texts, group, strict=True)
            )
    return right / len(numbers)


def hugging_face(path: Path) -> Any:
    """Hugging Face's model of a checkpoint, in float32."""
    import torch
    from transformers import SwitchTransformersForConditionalGeneration

    return SwitchTransformersForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32
    ).eval()


def scores(path: Path, language: str, numbers: Sequence[int]) -> float:
    """The score of a checkpoint with its own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return score(hugging_face(path), tokenizer, language, numbers)


def round_robin_owners(tenants: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Owner of each expert, named by its tensors' common beginning; from the tenants' Hugging Face
    state dicts.

    The paper's rule (arXiv 2505.06481, Algorithm 1), every position resident. Written apart from
    `common.plan.plan`, so that the scores reported here do not rest on the code they judge.
    """
    names = {n.rsplit(".", 2)[0] for n in tenants[0] if ".experts." in n}

    def place(name: str) -> tuple[bool, int, int]:
        parts = name.split(".")
        return parts[0] == "decoder", int(parts[2]), int(parts[-1].removeprefix("expert_"))

    totals = {}
    for name in sorted(names, key=place):
        flat = [
            np.concatenate([t[f"{name}.{p}.weight"].double().numpy().ravel() for p in ("wi", "wo")])
            for t in tenants
        ]
        totals[name] = sum(
            float(np.linalg.norm(a - b)) for i, a in enumerate(flat) for b in flat[i + 1 :]
        )
    # sorted is stable: ties stay in row-major order.
    return {name: i % len(tenants) for i, name in enumerate(sorted(totals, key=totals.__getitem__))}


def shared(tenants: Sequence[dict[str, Any]], index: int, owners: dict[str, int]) -> dict[str, Any]:
    """A tenant's state dict with every expert replaced by its owner's; all else its own."""
    return {
        n: tenants[owners[n.rsplit(".", 2)[0]]][n] if ".experts." in n else own
        for n, own in tenants[index].items()
    }


def average(tenants: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plain average of all weights."""
    return {name: sum(t[name] for t in tenants) / len(tenants) for name in tenants[0]}


def sharing_scores(
    out: Path, tokenizer: PreTrainedTokenizerBase, languages: Sequence[str], numbers: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Scores of the saved tenants with shared experts, and of the average of all weights.

    With more than four tenants, the first four are also scored as they share experts among
    themselves alone.
    """
    model = hugging_face(out / languages[0])
    states = []
    for language in languages:
        states.append({n: t.clone() for n, t in hugging_face(out / language).state_dict().items()})
    groups = {"": len(languages)} | ({"_of_4": 4} if len(languages) > 4 else {})
    found: dict[str, dict[str, float]] = {language: {} for language in languages}
    for name, size in groups.items():
        owners, mean = round_robin_owners(states[:size]), average(states[:size])
        for i, language in enumerate(languages[:size]):
            for title, state in (
                ("shared_round_robin", shared(states, i, owners)),
                ("plain_average", mean),
            ):
                model.load_state_dict(state)
                found[language][title + name] = score(model, tokenizer, language, numbers)
    return found


def moved(model: SwitchTransformer, base: dict[str, np.ndarray]) -> tuple[float, float]:
    """Relative L2 distance from the base: of all expert weights together, and of all others."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for name, array in canonical_tensors(model):
        kind = sums[".experts." in name]
        kind[0] += float(np.square(array - base[name]).sum())
        kind[1] += float(np.square(base[name]).sum())
    return math.sqrt(sums[True][0] / sums[True][1]), math.sqrt(sums[False][0] / sums[False][1])


def run(recipe: Recipe, out: Path, num_scored: int, console: Console) -> None:
    """Train the base and every language's tenant, save, score, write metrics.json."""
    started = time.perf_counter()
    numbers = training_numbers()
    texts = [expected(n, language) for language in recipe.languages for n in numbers[::7]]
    tokenizer = make_tokenizer(texts, recipe.vocab_size)
    base = make_model(recipe, len(tokenizer))
    sizes = {name: array.size for name, array in canonical_tensors(base)}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    console.print(
        f"{sum(sizes.values())} parameters, {experts / sum(sizes.values()):.0%} of them experts"
    )
    pairs = Pairs(
        tokenizer, [(str(n), [expected(n, lang) for lang in recipe.languages]) for n in numbers]
    )
    losses = {}
    with bars("base", recipe.base_steps) as advance:
        losses["base"] = train(
            base, pairs, recipe.base_steps, recipe.batch, recipe.base_lr, recipe.seed, advance
        )
    save(base, tokenizer, out / "base")
    weights = dict(canonical_tensors(base))
    tested = held_out(num_scored)
    rows: dict[str, Any] = {}
    for language in recipe.languages:
        model = load_model(open_checkpoint(out / "base"))  # what users have, rounded to bfloat16
        pairs = Pairs(tokenizer, [(str(n), [expected(n, language)]) for n in numbers])
        with bars(language, recipe.tune_steps) as advance:
            losses[language] = train(
                model,
                pairs,
                recipe.tune_steps,
                recipe.batch,
                recipe.tune_lr,
                recipe.seed + 1,
                advance,
            )
        save(model, tokenizer, out / language)
        distance = moved(model, weights)
        rows[language] = {
            "base": scores(out / "base", language, tested),
            "alone": scores(out / language, language, tested),
            "relative_l2_experts": distance[0],
            "relative_l2_non_experts": distance[1],
        }
    for language, found in sharing_scores(out, tokenizer, recipe.languages, tested).items():
        rows[language] |= found
    titles = list(rows[recipe.languages[0]])
    table = Table(title=f"{num_scored} held-out numbers, exactly right", title_justify="left")
    for title in ("tenant", *titles):
        table.add_column(title.replace("_", " "), justify="right")
    for language, row in rows.items():
        table.add_row(language, *(f"{row[title]:.1%}" if title in row else "" for title in titles))
    console.print(table)
    metrics = {
        "held_out_numbers": num_scored,
        "tenants": rows,
        "date": date.today().isoformat(),
        "recipe": asdict(recipe),
        "parameters": sum(sizes.values()),
        "expert_parameters": experts,
        "last_loss": {
            name: sum(values[-20:]) / len(values[-20:]) for name, values in losses.items()
        },
        "training_s": round(time.perf_counter() - started),
        "versions": {
            name: version(name)
            for name in ("jax", "flax", "optax", "transformers", "tokenizers", "num2words")
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


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
    save(model, tokenizer, out)
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = Path(__file__).resolve().parent.parent / "examples" / "tenants" / "switch"
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
    defaults = asdict(Recipe())
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if name == "languages":
            parser.add_argument(
                option, nargs="+", choices=ALL_LANGUAGES, help=f"default: {' '.join(LANGUAGES)}"
            )
        else:
            parser.add_argument(option, type=type(value), help=f"default {value}")
    parser.add_argument(
        "--scored", type=int, default=1000, help="held-out numbers that scores count"
    )
    args = parser.parse_args(argv)
    if (args.source is None) != (args.pairs is None):
        parser.error("--from and --pairs go together")
    if args.preset != "demo" and args.out == default_out:
        parser.error(
            f"--preset {args.preset} needs --out: {default_out} holds what the default recipe makes"
        )
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    recipe = replace(PRESETS[args.preset], **given)
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
            run(recipe, args.out, args.scored, console)
    except MoetelError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
