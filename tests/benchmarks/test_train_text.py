"""Texts and their split, and a tiny run of the training on them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.material import texts as material
from benchmarks.material import train_text
from common import MoetelError, build_store

TINY = train_text.Recipe(
    hidden_size=16,
    intermediate_size=16,
    layers=1,
    heads=2,
    kv_heads=1,
    experts=4,
    vocab_size=400,
    batch=8,
    base_steps=40,
    tune_steps=40,
    base_lr=1e-2,
    tune_lr=1e-2,
    context=32,
    max_characters=20_000,
    heldout_tokens=400,
    calibration_tokens=200,
)
SOURCES = {
    f"package/module_{i}.py": f'"""Module {i} says héllo."""\n\n\ndef give_{i}(value):\n    """Return {i}."""\n'  # noqa: E501
    f"    if value > {i}:\n        return value * {i}\n    return {i}\n"
    for i in range(60)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up text folder."""
    path = tmp_path_factory.mktemp("texts")
    words = {
        "wikitext2": ["castle", "river", "was", "built", "in", "the"],
        "ptb": ["shares", "rose", "mr.", "<unk>"],
    }
    for kind, its in words.items():
        for part, seed in (("validation", 0), ("test", 1)):
            rng = random.Random(seed)
            lines = [f" {part} " + " ".join(rng.choices(its, k=12)) + " \n" for _ in range(100)]
            (path / f"{kind}_{part}.txt").write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the whole script that takes seconds: its folder and what it reports."""
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "standard_library", lambda: SOURCES)
        return out, train_text.run(TINY, folder, out)


def lines(out: Path, tenant: str, kind: str) -> list[str]:
    rows = (out / "texts" / f"{tenant}.{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["text"] for row in rows]


@torch.inference_mode()
def loss_of(path: Path, texts: list[str]) -> float:
    """Mean cross-entropy of texts in transformers' model."""
    model, tokenizer = (c.from_pretrained(path) for c in (AutoModelForCausalLM, AutoTokenizer))
    rows = [torch.tensor([ids]) for ids in tokenizer(texts)["input_ids"]]
    return sum(float(model(input_ids=ids, labels=ids).loss) for ids in rows) / len(rows)


def test_losses_fall_and_are_reported(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = tiny
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    for tenant in material.TENANTS:
        assert metrics["last_loss"][tenant] < 0.9 * metrics["first_loss"][tenant], tenant
    for tenant in material.TENANTS[1:]:
        row = metrics["tenants"][tenant]
        assert row["relative_l2_experts"] > 0 and row["relative_l2_non_experts"] > 0
        assert loss_of(out / tenant, lines(out, tenant, "heldout")) < loss_of(
            out / "base", lines(out, tenant, "heldout")
        )


def test_files_load_in_transformers_and_in_a_store(
    tiny: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = tiny
    for tenant in material.TENANTS:
        model = AutoModelForCausalLM.from_pretrained(out / tenant)
        assert model.dtype == torch.bfloat16
        ids = AutoTokenizer.from_pretrained(out / tenant)("a castle")["input_ids"]
        assert ids[0] == model.config.bos_token_id and len(ids) > 1
    store = build_store(tmp_path / "store", {tenant: out / tenant for tenant in material.TENANTS})
    assert store.tenants == material.TENANTS


def test_held_out_and_training_text_do_not_overlap(
    tiny: tuple[Path, dict[str, Any]], folder: Path
) -> None:
    out, _ = tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "standard_library", lambda: SOURCES)
        texts = material.read_texts(folder, TINY.max_characters)
    for tenant in material.TENANTS:
        training, heldout = (
            "\0".join(part) for part in (texts[tenant].training, texts[tenant].heldout)
        )
        for kind, mine, other in (
            ("heldout", heldout, training),
            ("calibration", training, heldout),
        ):
            found = lines(out, tenant, kind)
            assert found and all(text in mine for text in found)
            assert not [text for text in found if len(text) > 40 and text in other]


def test_written_texts_have_about_the_tokens_asked_for(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, _ = tiny
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    for tenant in ("base", "ptb"):
        sizes = [len(ids) for ids in tokenizer(lines(out, tenant, "heldout"))["input_ids"]]
        assert max(sizes) <= TINY.context
        assert 0.5 * TINY.heldout_tokens < sum(sizes) < 1.5 * TINY.heldout_tokens


# --- texts


@pytest.fixture(scope="module")
def tokenizer(tiny: tuple[Path, dict[str, Any]]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny[0] / "base")


def test_pieces_are_the_document_in_order_and_keep_its_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    document = "\n\n".join(SOURCES.values())
    found = material.pieces(tokenizer, [document], 16)
    assert "".join(found) == document
    rows = tokenizer(found, add_special_tokens=False)["input_ids"]
    assert max(map(len, rows)) <= 15
    assert [t for ids in rows for t in ids] == tokenizer(document, add_special_tokens=False)[
        "input_ids"
    ]


def test_text_without_white_space_is_cut_all_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    found = material.pieces(tokenizer, ["xqz" * 40], 8)
    assert len(found) > 1 and "".join(found) == "xqz" * 40


def test_windows_begin_with_bos_and_teach_all_else(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = material.Windows(tokenizer, ["one two three " * 20, "four five"], 12)
    ids, labels = windows.batch(6, random.Random(0))
    assert ids.shape == labels.shape == (6, 12) and ids.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (labels[:, 0] == -100).all()
    assert torch.equal(ids[:, 1:], labels[:, 1:])
    with pytest.raises(MoetelError, match="shorter than one row of 4000"):
        material.Windows(tokenizer, ["one two"], 4000)
    other = material.Windows(tokenizer, ["9 8 7 6 " * 20], 12)
    ids, labels = material.Mixture([windows, other]).batch(64, random.Random(0))
    assert ids.shape == labels.shape == (64, 12) and torch.equal(ids[:, 1:], labels[:, 1:])
    digits = [any(c.isdigit() for c in tokenizer.decode(row)) for row in ids]
    assert 16 < sum(digits) < 48, "rows of either text, about as many of each"


def test_a_base_that_saw_all_texts_is_better_at_the_others(
    folder: Path, tiny: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "standard_library", lambda: SOURCES)
    monkeypatch.setattr(train_text, "Recipe", lambda **given: replace(TINY, **given))
    out = ["--out", str(tmp_path), "--texts", str(folder), "--threads", "1", "--tune-steps", "1"]
    assert train_text.main([*out, "--base-on-all"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["recipe"]["base_on_all"] and not tiny[1]["recipe"]["base_on_all"]
    for tenant in ("ptb", "code", "docs"):
        texts = lines(tmp_path, tenant, "heldout")
        assert loss_of(tmp_path / "base", texts) < loss_of(tiny[0] / "base", texts) - 0.2


@pytest.mark.slow
def test_the_standard_library_is_split_by_file_name() -> None:
    found = material.standard_library()
    names = list(found)
    assert {"argparse.py", "json/decoder.py"} <= set(names) and names == list(
        material.standard_library()
    )
    assert not [n for n in names if "site-packages" in n or n.startswith("test/")]
    assert any(a > b for a, b in pairwise(names))  # mixed
    assert 0.05 < sum(map(material.is_held_out, names)) / len(names) < 0.15


def test_docstrings_are_those_of_modules_classes_and_functions() -> None:
    source = '"""A."""\nx = "no"\nclass C:\n    """B\n\n    b."""\n    def f(self):\n        "F."\n        return "no"\n'  # noqa: E501
    assert material.docstrings(source) == "A.\n\nB\n\nb.\n\nF."
    assert material.docstrings("x = 1\n") == material.docstrings("x = = 1\n") == ""


def test_spread_keeps_the_order_and_takes_all_of_a_short_list(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [f"castle {i}" for i in range(100)]
    size = sum(map(len, tokenizer(texts)["input_ids"]))
    found = material.spread(tokenizer, texts, size // 4)
    assert (
        20 <= len(found) <= 30
        and found == sorted(found, key=texts.index)
        and texts.index(found[-1]) > 90
    )
    assert material.spread(tokenizer, texts, 10 * size) == texts


# --- the command


def test_a_missing_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        train_text.main(
            ["--out", str(tmp_path / "out"), "--texts", str(tmp_path), "--threads", "1"]
        )
        == 1
    )
    assert (
        "there is no wikitext2_validation.txt" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_texts_are_looked_for_below_the_shared_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOETEL_SHARED", str(tmp_path))
    assert train_text.default_texts() == tmp_path / "data" / "text"
    monkeypatch.delenv("MOETEL_SHARED")
    assert train_text.default_texts().parts[-3:] == ("shared", "data", "text")
