"""The quality benchmark at a tiny size, on the shipped tenants; and that no held-out number
calibrates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as quality
from scripts.demo.number_words import expected, is_held_out
from tests import helpers

EXAMPLES = helpers.REPOSITORY / "examples" / "tenants"


def material(tmp_path: Path) -> Path:
    """The folder's layout, with what is shipped: seeds 0 and 1 are the same."""
    root = tmp_path / "material"
    for name, folder in (("numbers", EXAMPLES), ("switch", EXAMPLES / "switch")):
        (root / name).mkdir(parents=True)
        for seed in (0, 1):
            (root / name / f"seed{seed}").symlink_to(folder)
    text = root / "text" / "seed0"
    (text / "texts").mkdir(parents=True)
    for tenant, language in zip(quality.TEXTS, ("base", "en", "fr", "de"), strict=True):
        (text / tenant).symlink_to(EXAMPLES / language)
        for kind, number in (("heldout", 12_345), ("calibration", 6789)):
            line = json.dumps({"text": expected(number, "en" if language == "base" else language)})
            (text / "texts" / f"{tenant}.{kind}.jsonl").write_text(line + "\n")
    return root


@pytest.mark.slow
def test_numbers_over_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--material",
        str(material(tmp_path)),
        "--seeds",
        "0",
        "1",
        "--tenants",
        "2",
        "--scored",
        "4",
        "--quiet",
    ]
    methods = ["--methods", "round_robin", "average", "fit@0", "--calibration", "4"]
    results = quality.main(["numbers", *options, *methods, "--out", str(tmp_path / "out")])
    assert [(r.seed, r.method) for r in results] == [
        (seed, method)
        for seed in (0, 1)
        for method in ("alone", "round robin", "average", "fit + 0 %")
    ]
    assert all(r.mean("exact_match") == 1.0 for r in results if r.method == "alone")
    assert results[3].expected is not None
    assert results[1].mean("kl") == results[5].mean("kl") and results[2].mean("kl") == results[
        6
    ].mean("kl")
    assert results[3].mean("kl") != results[7].mean(
        "kl"
    )  # the same tenants, calibrated on other numbers
    assert "| average | 100.0% |" in capsys.readouterr().out
    assert (
        "numbers, 2 tenants, seeds 0, 1; en: 4 questions"
        in (tmp_path / "out" / "numbers.md").read_text()
    )
    assert {p.name for p in (tmp_path / "out" / "numbers-2-tenants").iterdir()} == {
        "quality.json",
        "quality.md",
        "quality.png",
    }


@pytest.mark.slow
def test_text_in_the_papers_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--material",
        str(material(tmp_path)),
        "--quiet",
        "--methods",
        "base",
        "round_robin",
        "average",
    ]
    results = quality.main(["text", *options])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("| | alone | base | round robin | average |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[at + 2 : at + 7]]
    assert [row[0] for row in rows] == [*quality.TEXTS, "experts' memory"]
    assert rows[0][1] == rows[0][2]  # the base tenant alone is the base
    assert rows[1][1] == f"{results[0].tenants['ptb'].perplexity:.2f}"
    assert rows[-1][1:] == ["400.0%", "100.0%", "100.0%", "100.0%"]


@pytest.mark.slow
def test_another_recipe_of_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = material(tmp_path)
    (root / "text").rename(root / "text_mild")
    options = [
        "--material",
        str(root),
        "--folder",
        "text_mild",
        "--tenants",
        "2",
        "--quiet",
        "--methods",
        "round_robin",
    ]
    results = quality.main(["text", *options, "--out", str(tmp_path / "out")])
    assert [(r.material, list(r.tenants)) for r in results] == [
        ("text_mild, 2 tenants", ["base", "ptb"])
    ] * 2
    assert all(r.mean("perplexity") for r in results), "it is judged as its family is"
    assert (
        "## text_mild, 2 tenants: perplexity of held-out text"
        in (tmp_path / "out" / "text_mild.md").read_text()
    )
    assert (tmp_path / "out" / "text_mild-2-tenants" / "quality.json").is_file()
    assert capsys.readouterr().out.count("# Quality: text_mild") == 1
    with pytest.raises(SystemExit) as leave:
        quality.main(["text", "--material", str(root)])
    assert leave.value.code == 1 and f"{root}/text/seed0/base: not there" in capsys.readouterr().err


@pytest.mark.slow
def test_switch_as_more_variants_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jax")
    options = [
        "--material",
        str(material(tmp_path)),
        "--tenants",
        "2",
        "3",
        "--scored",
        "3",
        "--quiet",
    ]
    results = quality.main(["switch", *options, "--methods", "round_robin"])
    assert [list(r.tenants) for r in results] == [["en"]] * 4
    assert [r.memory.share for r in results] == [2.0, 1.0, 3.0, 1.0]
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("| | 2 tenants | 3 tenants |")
    assert lines[at + 2] == "| alone | 100.0% | 100.0% |"


def test_calibration_uses_training_numbers() -> None:
    examples = quality.number_prompts(60, seed=0).examples
    numbers = [int(str(e.prompt)) for e in examples]
    assert len(numbers) == 60 and not any(map(is_held_out, numbers))
    assert {len(str(n)) for n in numbers} == {3, 4, 5}


@pytest.mark.slow
def test_training_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("num2words")
    sizes = "--hidden-size 16 --intermediate-size 16 --layers 1 --heads 2 --kv-heads 1 --experts 2 --vocab-size 300"  # noqa: E501
    tiny = f"{sizes} --languages en fr --batch 2 --base-steps 2 --tune-steps 1 --threads 1".split()
    monkeypatch.setitem(quality.RECIPES, "numbers", ("benchmarks.material.train_demo", *tiny))
    there = tmp_path / "numbers"
    (there / "seed3").mkdir(parents=True)
    (there / "seed4.partial" / "left").mkdir(parents=True)
    quality.train_missing(tmp_path, "numbers", [3, 4])
    assert sorted(p.name for p in there.iterdir()) == ["seed3", "seed4", "seed4.log"]
    assert not list((there / "seed3").iterdir()), "what is there is not trained again"
    assert {p.name for p in (there / "seed4").iterdir()} == {"base", "en", "fr", "metrics.json"}
    assert json.loads((there / "seed4" / "metrics.json").read_text())["recipe"]["seed"] == 4

    monkeypatch.setitem(
        quality.RECIPES,
        "text",
        ("benchmarks.material.train_text", "--texts", str(tmp_path / "nowhere")),
    )
    for folder, what in (
        ("text", f"{tmp_path}/text/seed0.log says why"),
        ("mine", "no recipe for 'mine'"),
    ):
        with pytest.raises(SystemExit) as leave:
            quality.main(["text", "--material", str(tmp_path), "--folder", folder, "--train"])
        assert leave.value.code == 1
        assert what in capsys.readouterr().err
    assert not (tmp_path / "text" / "seed0").exists()


def test_missing_material_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, what in (
        (["numbers", "--material", str(tmp_path)], f"{tmp_path}/numbers/seed0/base: not there"),
        (["text", "--material", str(tmp_path), "--tenants", "9"], "text has 2 to 4"),
    ):
        with pytest.raises(SystemExit) as leave:
            quality.main(arguments)
        assert leave.value.code == 1
        assert what in capsys.readouterr().err
