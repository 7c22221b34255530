"""Tests of scripts/train_switch_demo.py: a tiny run, a fine-tune of one's own, the checkpoints that
examples/ ships."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import torch
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

from benchmarks.material import train_switch_demo as script
from common.checkpoints import open_checkpoint
from jax_engine.tenants.weights import canonical_tensors, load_model
from scripts.demo.number_words import ALL_LANGUAGES, LANGUAGES, expected, held_out, training_numbers
from tests import helpers

EXAMPLES = helpers.REPOSITORY / "examples" / "tenants" / "switch"
NUMBERS = training_numbers()[:1000]  # spelling all of them takes a minute
TINY = [
    "--base-steps=6",
    "--tune-steps=4",
    "--d-model=16",
    "--d-kv=4",
    "--d-ff=24",
    "--layers=2",
    "--experts=2",
    "--batch=8",
    "--languages",
    "en",
    "fr",
    "--scored=3",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "training_numbers", lambda: NUMBERS)
        assert script.main([*TINY, f"--out={out}"]) == 0
    return out


@pytest.mark.slow
def test_a_run_writes_what_hugging_face_loads_and_reports_what_it_did(tiny: Path) -> None:
    metrics = json.loads((tiny / "metrics.json").read_text())
    assert set(metrics["tenants"]) == {"en", "fr"} and set(metrics["last_loss"]) == {
        "base",
        "en",
        "fr",
    }
    assert (
        metrics["recipe"]["d_model"] == 16
        and 0 < metrics["tenants"]["en"]["relative_l2_experts"] < 1
    )
    for name in ("base", "en", "fr"):
        model, loading = SwitchTransformersForConditionalGeneration.from_pretrained(
            tiny / name, output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        ours = dict(canonical_tensors(load_model(open_checkpoint(tiny / name))))
        theirs = model.state_dict()
        assert all(
            np.array_equal(array, theirs[key].float().numpy()) for key, array in ours.items()
        )


@pytest.mark.slow
def test_sharing_is_scored(tiny: Path) -> None:
    for row in json.loads((tiny / "metrics.json").read_text())["tenants"].values():
        assert {"base", "alone", "shared_round_robin", "plain_average"} <= row.keys()
        assert "shared_round_robin_of_4" not in row


def test_owners_follow_the_order_of_distances() -> None:
    """One expert a position, three tenants; encoder before decoder where distances tie."""
    places = [
        "decoder.block.1.layer.2.mlp.experts.expert_0",
        "encoder.block.1.layer.1.mlp.experts.expert_0",
    ]
    places.append("encoder.block.1.layer.1.mlp.experts.expert_1")
    distances = dict(zip(places, (1, 1, 0.5), strict=True))
    tenants = [
        {
            f"{name}.{p}.weight": torch.full((2, 2), i * distances[name])
            for name in places
            for p in ("wi", "wo")
        }
        for i in range(3)
    ]
    owners = script.round_robin_owners(tenants)
    assert owners == {places[2]: 0, places[1]: 1, places[0]: 2}
    rest = [t | {"shared.weight": torch.full((2,), float(i))} for i, t in enumerate(tenants)]
    found = script.shared(rest, 1, owners)
    assert float(found["shared.weight"][0]) == 1
    assert (
        float(found[f"{places[0]}.wo.weight"][0, 0]) == 2
        and float(found[f"{places[2]}.wi.weight"][0, 0]) == 0
    )
    assert float(script.average(rest)["shared.weight"][0]) == 1


def test_the_default_recipe_is_that_of_the_shipped_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(script, "run", lambda recipe, *rest: found.append(recipe))
    assert script.main([]) == 0
    arguments = ["--preset", "ten", "--out", "somewhere", "--seed", "2", "--languages", "tr", "en"]
    assert script.main(arguments) == 0
    shipped = json.loads((EXAMPLES / "metrics.json").read_text())["recipe"]
    assert json.loads(json.dumps(asdict(found[0]))) == shipped
    ten = script.PRESETS["ten"]
    assert ten.languages == ALL_LANGUAGES and found[1] == replace(
        ten, seed=2, languages=("tr", "en")
    )


def test_a_preset_never_writes_over_the_shipped_tenants(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--preset", "ten"])
    assert "needs --out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loss_is_hugging_faces(tiny: Path) -> None:
    """Cross-entropy of answers, on padded rows, against transformers' own from the same file."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "en")
    pairs = script.Pairs(tokenizer, [(str(n), [expected(n, "en")]) for n in (7, 42, 1234, 99999)])
    drawn = pairs.batch(6, random.Random(0))
    _, entropy = script.loss(load_model(open_checkpoint(tiny / "en")), drawn.prompts, drawn.answers)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        tiny / "en", dtype=torch.float32
    ).eval()
    labels = torch.from_numpy(drawn.answers).long()
    with torch.inference_mode():
        out = model(
            input_ids=torch.from_numpy(drawn.prompts).long(),
            attention_mask=torch.from_numpy(drawn.prompts != 0).long(),
            labels=labels.masked_fill(labels == 0, -100),
        )
    assert abs(float(entropy) - float(out.loss)) < 1e-4


@pytest.mark.slow
def test_a_fine_tune_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("1\tone\n2\ttwo\n12\ttwelve\n\n")
    arguments = [
        "--from",
        str(tiny / "base"),
        "--pairs",
        str(pairs),
        "--out",
        str(tmp_path / "mine"),
        "--batch=4",
    ]
    assert script.main([*arguments, "--tune-steps=40", "--tune-lr=0.02"]) == 0
    tuned, base = (load_model(open_checkpoint(p)) for p in (tmp_path / "mine", tiny / "base"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    drawn = script.Pairs(tokenizer, [("1", ["one"]), ("2", ["two"])]).batch(4, random.Random(0))
    after, before = (float(script.loss(m, drawn.prompts, drawn.answers)[1]) for m in (tuned, base))
    assert after < 0.7 * before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\tone\nno tab here\n", "line 2 is not a prompt, one tab and an answer"),
        ("\n", "no line with a prompt"),
    ],
)
def test_bad_pairs_are_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "pairs.tsv").write_text(text)
    arguments = [
        "--from",
        str(tiny / "base"),
        "--pairs",
        str(tmp_path / "pairs.tsv"),
        "--out",
        str(tmp_path / "x"),
    ]
    assert script.main(arguments) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_mixtral_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("1\tone\n")
    source = str(EXAMPLES.parent / "en")
    assert (
        script.main(
            ["--from", source, "--pairs", str(tmp_path / "pairs.tsv"), "--out", str(tmp_path / "x")]
        )
        == 1
    )
    assert "a mixtral checkpoint; this script trains Switch Transformers" in capsys.readouterr().err


@pytest.mark.parametrize("language", LANGUAGES)
def test_shipped_tenants_spell(language: str) -> None:
    """In Hugging Face's model, from the shipped files."""
    assert script.scores(EXAMPLES / language, language, held_out(200)) >= 0.95


def test_shipped_files_are_small() -> None:
    for name in ("base", *LANGUAGES):
        sizes: dict[str, Any] = {p.name: p.stat().st_size for p in (EXAMPLES / name).iterdir()}
        assert max(sizes.values()) < 2_000_000
        assert json.loads((EXAMPLES / name / "config.json").read_text())["dtype"] == "bfloat16"
