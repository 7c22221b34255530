"""The checkpoints that examples/ ships: small, as the hub holds them, and right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
    SwitchTransformersForConditionalGeneration,
)

from scripts.demo.number_words import LANGUAGES, expected, held_out
from tests import helpers

EXAMPLES = helpers.REPOSITORY / "examples" / "tenants"


@pytest.mark.parametrize("name", ["base", *LANGUAGES])
def test_shipped_files_are_small_and_as_the_hub_holds_them(name: str) -> None:
    config = json.loads((EXAMPLES / name / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["dtype"] == "bfloat16"
    assert (
        config["sliding_window"] is None
        and config["tie_word_embeddings"] is False
        and config["head_dim"]
    )
    assert json.loads((EXAMPLES / name / "generation_config.json").read_text())["eos_token_id"] == 2
    assert max(p.stat().st_size for p in (EXAMPLES / name).iterdir()) < 2_000_000
    with safe_open(EXAMPLES / name / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
        assert {file.get_slice(n).get_dtype() for n in names} == {"BF16"}


def test_shipped_files_are_small_together() -> None:
    assert sum(p.stat().st_size for p in EXAMPLES.rglob("*") if p.is_file()) < 19_000_000


@torch.inference_mode()
def share_right(
    model: Any, tokenizer: PreTrainedTokenizerBase, language: str, numbers: Sequence[int]
) -> float:
    """Of the numbers that transformers' greedy answers spell exactly."""
    right = 0
    # Rows of one prompt length need no padding.
    for digits in sorted({len(str(n)) for n in numbers}):
        group = [n for n in numbers if len(str(n)) == digits]
        ids = torch.tensor(tokenizer([str(n) for n in group])["input_ids"])
        out = model.generate(input_ids=ids, max_new_tokens=80, do_sample=False)
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        texts = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
        right += sum(text == expected(n, language) for text, n in zip(texts, group, strict=True))
    return right / len(numbers)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("folder", "model"),
    [
        (EXAMPLES, MixtralForCausalLM),
        (EXAMPLES / "switch", SwitchTransformersForConditionalGeneration),
    ],
    ids=["mixtral", "switch"],
)
def test_shipped_tenants_spell(folder: Path, model: Any, language: str) -> None:
    """In Hugging Face's model, from the shipped files."""
    loaded = model.from_pretrained(folder / language, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / language, local_files_only=True)
    assert share_right(loaded, tokenizer, language, held_out(200)) >= 0.95


def test_shipped_switch_files_are_small() -> None:
    for name in ("base", *LANGUAGES):
        sizes = {p.name: p.stat().st_size for p in (EXAMPLES / "switch" / name).iterdir()}
        assert max(sizes.values()) < 2_000_000
        config = json.loads((EXAMPLES / "switch" / name / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
