"""Training of the Mixtrals that spell numbers: its tokenizer, a tiny run, its presets."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.material import train_demo
from scripts.demo.number_words import ALL_LANGUAGES, LANGUAGES, expected, held_out, training_numbers
from tests import helpers

EXAMPLES = helpers.REPOSITORY / "examples" / "tenants"
NUMBERS = training_numbers()[:1000]
TINY = train_demo.Recipe(
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    heads=2,
    kv_heads=1,
    experts=4,
    vocab_size=320,
    batch=16,
    base_steps=10,
    tune_steps=4,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_demo.number_tokenizer(
        [expected(n, lang) for lang in LANGUAGES for n in NUMBERS], 400
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the whole script that takes seconds: its folder and what it reports."""
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_demo, "training_numbers", lambda: NUMBERS)
        return out, train_demo.run(TINY, out)


# --- tokenizer


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_survive_the_tokenizer(tokenizer: PreTrainedTokenizerFast, language: str) -> None:
    for number in (0, 16, 35, *held_out(300)):
        ids = [
            *tokenizer(expected(number, language), add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected(number, language)


@pytest.mark.parametrize("text", ["dieciséis", "fünf", "dreißig", "año", " led by a space", "日本"])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_prompts_are_single_digits_in_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("90210")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "9", "0", "2", "1", "0", "<sep>"]
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<sep>"]) == [0, 1, 2, 3]


def test_batches_ask_for_the_answer_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = train_demo.Examples(tokenizer, [7, 1234], ["de"]).batch(32, random.Random(0))
    assert ids.shape == labels.shape and ids.dtype == labels.dtype == torch.int64
    for row, label in zip(ids, labels, strict=True):
        start = row.tolist().index(tokenizer.convert_tokens_to_ids("<sep>")) + 1
        number = int(tokenizer.decode(row[:start], skip_special_tokens=True))
        answer = label[label >= 0]
        assert (label[:start] == -100).all() and torch.equal(
            answer, row[start : start + len(answer)]
        )
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer, skip_special_tokens=True) == expected(number, "de")


# --- a tiny run


def test_a_run_writes_checkpoints_that_transformers_loads(
    tiny: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = tiny
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(("base", *LANGUAGES))
    for name in ("base", *LANGUAGES):
        model = AutoModelForCausalLM.from_pretrained(out / name, experts_implementation="eager")
        assert type(model) is MixtralForCausalLM and model.dtype == torch.bfloat16
        assert (
            AutoTokenizer.from_pretrained(out / name)("12")["input_ids"][0]
            == model.config.bos_token_id
        )


def test_a_run_reports_what_it_did(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = tiny
    assert json.loads((out / "metrics.json").read_text())["tenants"].keys() == set(LANGUAGES)
    assert metrics["recipe"]["seed"] == TINY.seed
    for row in metrics["tenants"].values():
        assert row["relative_l2_experts"] > 0 and row["relative_l2_non_experts"] > 0


def test_loss_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    model = train_demo.make_model(TINY, tokenizer)
    losses = train_demo.train(
        model,
        train_demo.Examples(tokenizer, NUMBERS, ["en"]),
        steps=30,
        batch=16,
        lr=4e-3,
        seed=0,
        advance=lambda: None,
    )
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.slow
def test_it_starts_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.material.train_demo", "--help"],
        cwd=helpers.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "--base-steps" in done.stdout


# --- presets


def recipe_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> train_demo.Recipe:
    """The recipe that the command would run."""
    found = []
    monkeypatch.setattr(train_demo, "run", lambda recipe, *rest: found.append(recipe))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert train_demo.main(arguments) == 0
    (recipe,) = found
    return recipe


def test_the_default_recipe_is_that_of_the_shipped_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = json.loads((EXAMPLES / "metrics.json").read_text())["recipe"]
    assert json.loads(json.dumps(asdict(recipe_of(monkeypatch)))) == shipped


def test_options_override_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    ten = recipe_of(monkeypatch, "--preset", "ten", "--out", "somewhere")
    assert (
        ten == train_demo.PRESETS["ten"] and ten.languages == ALL_LANGUAGES and ten.tune_lr > 1e-3
    )
    arguments = [
        "--preset",
        "ten",
        "--out",
        "somewhere",
        "--seed",
        "2",
        "--tune-lr",
        "0.5",
        "--languages",
        "tr",
        "en",
    ]
    assert recipe_of(monkeypatch, *arguments) == replace(
        ten, seed=2, tune_lr=0.5, languages=("tr", "en")
    )


def test_a_preset_never_writes_over_the_shipped_tenants(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_demo.main(["--preset", "ten"])
    assert "needs --out" in capsys.readouterr().err
