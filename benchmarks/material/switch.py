"""Training of small Switch Transformers in Flax and optax, on the JAX engine's own model.

Every expert runs on every token, so it suits small models.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import PreTrainedTokenizerBase

from common.checkpoints import write_hugging_face
from common.dtypes import BFLOAT16
from common.families import FAMILIES, ModelConfig
from common.families.shape import DECODER_EMBED, ENCODER_EMBED
from jax_engine.layers.attention import prompt_mask
from jax_engine.layers.variables import Initializer, PoolVariable
from jax_engine.models.checkpoints import canonical_tensors, training_spec
from jax_engine.models.encoder_decoder import EncoderDecoderModel
from scripts.demo.number_words import LANGUAGES


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
    model: EncoderDecoderModel, prompts: jax.Array, answers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the answers' tokens, plus 0.01 of the routers' load-balancing loss; and
    the former alone.

    Load balance: Switch Transformers (arXiv 2101.03961), section 2.2, mean over layers; 1 if
        experts share evenly.
    """
    shape = model.spec.shape
    experts = shape.experts.count
    slot_of = jnp.tile(jnp.arange(experts, dtype=jnp.int32), (len(shape.sparse_layers), 1))
    balance: list[jax.Array] = []

    def feed(block: Any, x: jax.Array, live: jax.Array) -> jax.Array:
        if block.position is not None:
            probabilities = jax.nn.softmax(block.router.logits(block.ff_norm(x)), axis=-1)
            chosen = jax.nn.one_hot(probabilities.argmax(axis=-1), experts)
            share, mean = (
                (v * live[..., None]).sum(axis=(0, 1)) / live.sum() for v in (chosen, probabilities)
            )
            balance.append(experts * (share * mean).sum())
        found: jax.Array = block.feed(x, slot_of, live, ())
        return found

    live = prompts != 0
    x, bias = model.embed(ENCODER_EMBED, prompts), model.bias_of_encoder(live)
    for block in model.encoder:
        x = feed(block, block.encode(x, bias), live)
    encoded = model.encoded(x)
    answer_live = answers != 0
    start = jnp.full((len(answers), 1), shape.decoder_start_token_id, answers.dtype)
    x = model.embed(DECODER_EMBED, jnp.concatenate([start, answers[:, :-1]], axis=1))
    length = answers.shape[1]
    bias, encoder_bias = model.bias_of_decoder(jnp.arange(length)[None], length), prompt_mask(live)
    for block, theirs in zip(model.decoder, encoded, strict=True):
        x, _ = block.decode(x, bias, None, None, theirs, encoder_bias)
        x = feed(block, x, answer_live)
    each = optax.softmax_cross_entropy_with_integer_labels(
        model.logits(x, shape.vocab_size), answers
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
    every = nnx.DiffState(0, nnx.Any(nnx.Param, PoolVariable))
    (_, entropy), grads = nnx.value_and_grad(loss, argnums=every, has_aux=True)(
        model, prompts, answers
    )
    optimizer.update(model, grads)
    return entropy


def train(
    model: EncoderDecoderModel,
    pairs: Pairs,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    advance: Callable[[], None],
) -> list[float]:
    """AdamW, all weights, in place. Returns each step's cross-entropy."""
    optimizer = nnx.Optimizer(model, adamw(steps, lr), wrt=nnx.Any(nnx.Param, PoolVariable))
    rng = random.Random(seed)
    losses = []
    for _ in range(steps):
        drawn = pairs.batch(batch, rng)
        losses.append(
            step(model, optimizer, jnp.asarray(drawn.prompts), jnp.asarray(drawn.answers))
        )
        advance()
    return [float(v) for v in losses]


def make_config(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """The shape of a recipe: every second layer sparse on both sides, tied, ReLU."""
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
    return FAMILIES["switch_transformers"].parse_config(raw, "recipe")


def make_model(config: ModelConfig, seed: int) -> EncoderDecoderModel:
    """Random weights."""
    return EncoderDecoderModel(training_spec(config), Initializer(seed))


def save(
    model: EncoderDecoderModel,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
) -> None:
    """Write a Hugging Face checkpoint in bfloat16."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = ((name, array.astype(BFLOAT16)) for name, array in canonical_tensors(model, config))
    family = FAMILIES[config.experts.family]
    write_hugging_face(path, family.hf_config(config, "bfloat16"), tensors)
    ids = {k: config.raw.get(k) for k in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    (path / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(path)


def moved(tensors: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative L2 distance from the base: of all expert weights together, and of all others."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for name, array in tensors.items():
        kind = sums[".experts." in name]
        kind[0] += float(np.square(array - base[name]).sum())
        kind[1] += float(np.square(base[name]).sum())
    return {
        kind: math.sqrt(sums[expert][0] / sums[expert][1])
        for kind, expert in (("relative_l2_experts", True), ("relative_l2_non_experts", False))
    }
