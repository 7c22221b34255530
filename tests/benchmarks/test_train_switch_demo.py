"""Training of the Switch Transformers that spell numbers, and a fine-tune of one's own."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")

import torch
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

from benchmarks.material import switch
from benchmarks.material import train_switch_demo as script
from common.checkpoints import open_checkpoint
from jax_engine.models.checkpoints import canonical_tensors, load_model
from scripts.demo.number_words import ALL_LANGUAGES, expected, training_numbers
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
        checkpoint = open_checkpoint(tiny / name)
        ours = dict(canonical_tensors(load_model(checkpoint), checkpoint.config))
        theirs = model.state_dict()
        assert all(
            np.array_equal(array, theirs[key].float().numpy()) for key, array in ours.items()
        )


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
    pairs = switch.Pairs(tokenizer, [(str(n), [expected(n, "en")]) for n in (7, 42, 1234, 99999)])
    drawn = pairs.batch(6, random.Random(0))
    _, entropy = switch.loss(load_model(open_checkpoint(tiny / "en")), drawn.prompts, drawn.answers)
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
    drawn = switch.Pairs(tokenizer, [("1", ["one"]), ("2", ["two"])]).batch(4, random.Random(0))
    after, before = (float(switch.loss(m, drawn.prompts, drawn.answers)[1]) for m in (tuned, base))
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
