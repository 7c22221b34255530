"""Training of small Mixtrals: Hugging Face's model and nothing of Moetel's engine."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


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


class Batches(Protocol):
    """What `train` learns from."""

    def batch(self, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, int64 [size, longest]; labels are -100 where nothing is to be
        learnt."""


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


def make_model(recipe: Training, tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    torch.manual_seed(recipe.seed)
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
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


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def moved(model: MixtralForCausalLM, base: MixtralForCausalLM) -> dict[str, float]:
    """Relative L2 distance from the base: of all expert weights together, and of all others."""
    found = {}
    for kind, wanted in (("relative_l2_experts", True), ("relative_l2_non_experts", False)):
        pairs = [
            (p, q)
            for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True)
            if is_expert(n) == wanted
        ]
        distance = math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in pairs))
        found[kind] = distance / math.sqrt(sum(float(q.detach().square().sum()) for _, q in pairs))
    return found
