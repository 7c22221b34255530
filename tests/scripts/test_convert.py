"""The two converters, as a user runs them: T5X and Orbax to Hugging Face and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import SwitchTransformersForConditionalGeneration

from common.checkpoints import open_checkpoint, safetensors_file, tensorstore_array
from scripts import cli
from tests import helpers, switch
from tests.helpers import shared_path
from tests.oracle.test_t5x import assert_same, moved_experts


def to_t5x(*args: Any) -> int:
    return cli.main(["convert_hf", *map(str, args)])


def to_hf(*args: Any) -> int:
    return cli.main(["convert_t5x", *map(str, args)])


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "hf"
    switch.random_switch().save_pretrained(path)
    (path / "tokenizer.json").write_text('{"any": "bytes"}', encoding="utf-8")
    return path


def logits(path: Path) -> np.ndarray:
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32
    ).eval()
    ids = torch.arange(24).reshape(2, 12) + 3
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.numpy()
    return found


@pytest.mark.parametrize("to", ["t5x", "orbax"])
@pytest.mark.parametrize("variant", ["plain", "untied", "router bias", "wide"])
def test_there_and_back(to: str, variant: str, tmp_path: Path) -> None:
    """Bit for bit in float32, and transformers computes the same from what comes back."""
    switch.random_switch(**switch.VARIANTS[variant]).save_pretrained(tmp_path / "hf")
    assert to_t5x(tmp_path / "hf", tmp_path / "there", "--to", to) == 0
    assert to_hf(tmp_path / "there", tmp_path / "back") == 0
    there, back = (load_file(tmp_path / p / "model.safetensors") for p in ("hf", "back"))
    assert {n: there[n].tobytes() for n in there}.items() <= {
        n: back[n].tobytes() for n in back
    }.items()
    assert_same(open_checkpoint(tmp_path / "back"), open_checkpoint(tmp_path / "hf"))
    before, after = (json.loads((tmp_path / p / "config.json").read_text()) for p in ("hf", "back"))
    assert before == after
    assert np.array_equal(logits(tmp_path / "hf"), logits(tmp_path / "back"))


def test_assets_notes_and_configs(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_t5x(hf, tmp_path / "checkpoint_50", "--to", "t5x") == 0
    assert "checkpoint_50: t5x, step 50, " in capsys.readouterr().out
    assert switch.load_index(tmp_path / "checkpoint_50")["optimizer"]["state"]["step"] == 50
    assert to_hf(tmp_path / "checkpoint_50", tmp_path / "a") == 0
    out = capsys.readouterr()
    assert "switch_transformers" in out.out and "defaults" not in out.out and "100%" not in out.out
    for path in ("checkpoint_50", "a"):
        assert (tmp_path / path / "tokenizer.json").read_bytes() == (
            hf / "tokenizer.json"
        ).read_bytes()
        assert (tmp_path / path / "generation_config.json").exists()
    (tmp_path / "checkpoint_50" / "config.json").unlink()
    assert to_hf(tmp_path / "checkpoint_50", tmp_path / "b") == 0
    assert (
        "T5's defaults taken (--config overrides): relative_attention_max_distance 128"
        in capsys.readouterr().out
    )
    assert (
        json.loads((tmp_path / "b" / "config.json").read_text())["relative_attention_max_distance"]
        == 128
    )
    assert to_hf(tmp_path / "checkpoint_50", tmp_path / "c", "--config", hf / "config.json") == 0
    assert (
        json.loads((tmp_path / "c" / "config.json").read_text())["relative_attention_max_distance"]
        == 20
    )
    assert_same(open_checkpoint(tmp_path / "c"), open_checkpoint(hf))


@pytest.mark.parametrize("to", ["t5x", "orbax"])
def test_types(to: str, hf: Path, tmp_path: Path) -> None:
    assert to_t5x(hf, tmp_path / "narrow", "--to", to, "--dtype", "bfloat16") == 0
    assert open_checkpoint(tmp_path / "narrow").dtype == "bfloat16"
    assert to_hf(tmp_path / "narrow", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    model = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "back")
    expected = switch.random_switch().to(torch.bfloat16).state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())


def test_fixtures(tmp_path: Path) -> None:
    """t5x's own files become a Hugging Face model with the reference logits."""
    root = shared_path("fixtures/switch_tiny")
    assert to_hf(root / "t5x", tmp_path / "hf", "--config", root / "hf") == 0
    assert_same(open_checkpoint(tmp_path / "hf"), open_checkpoint(root / "hf"))
    reference = np.load(root / "reference.npz")
    model = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        found = model(
            input_ids=torch.as_tensor(reference["input_ids"]),
            attention_mask=torch.as_tensor(reference["attention_mask"]),
            decoder_input_ids=torch.as_tensor(reference["decoder_input_ids"]),
        ).logits.numpy()
    helpers.assert_close(found, reference["logits"])


def mixtral(tmp_path: Path) -> Path:
    return helpers.save(helpers.random_mixtral(0), tmp_path / "mixtral")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            lambda p: (mixtral(p), p / "out", "--to", "t5x"),
            "holds a mixtral model; only Switch Transformers",
        ),
        (
            lambda p: (mixtral(p), p / "out", "--to", "orbax"),
            "holds a mixtral model; only Switch Transformers",
        ),
        (lambda p: (p / "hf", p / "hf", "--to", "t5x"), "exists and is not an empty directory"),
        (
            lambda p: (p / "hf", p / "hf" / "config.json", "--to", "t5x"),
            "exists and is not an empty directory",
        ),
        (lambda p: (p / "nothing", p / "out", "--to", "t5x"), "no such directory"),
        (
            lambda p: (p / "hf", p / "checkpoint_7", "--to", "t5x", "--step", "8"),
            "is named for step 7, but --step is 8",
        ),
    ],
)
def test_refused(
    args: Callable[[Path], tuple[Any, ...]],
    message: str,
    hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(hf, tmp_path / "hf")
    given = args(tmp_path)
    before = helpers.fingerprint(tmp_path)
    assert to_t5x(*given) == 1
    assert message in capsys.readouterr().err
    assert helpers.fingerprint(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_refused_the_other_way(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_hf(hf, tmp_path / "out") == 1
    assert "a Hugging Face directory already; nothing to convert" in capsys.readouterr().err
    parameters = switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    path = switch.write_t5x(tmp_path / "t5x", moved_experts(parameters))
    assert to_hf(path, tmp_path / "out") == 1
    assert "sparse encoder layers [2, 5]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["-1", "x", "2147483648", "1.5"])
def test_steps_are_whole_numbers(text: str, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        to_t5x(hf, tmp_path / "out", "--to", "t5x", f"--step={text}")
    assert caught.value.code == 2


@pytest.mark.parametrize("direction", ["t5x", "orbax", "hf"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(
    direction: str,
    fault: BaseException,
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = hf
    if direction == "hf":
        source = tmp_path / "source"
        assert to_t5x(hf, source, "--to", "t5x") == 0
    count = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == 20:
                raise fault
            return real(*args)

        return read

    for kind in (safetensors_file.TensorRef, tensorstore_array.LazyTensor):
        monkeypatch.setattr(kind, "read", failing(kind.read))
    (tmp_path / "out").mkdir()
    before = helpers.fingerprint(tmp_path)
    convert = to_hf if direction == "hf" else to_t5x
    assert (
        convert(source, tmp_path / "out", *([] if direction == "hf" else ["--to", direction])) == 1
    )
    error = capsys.readouterr().err
    assert ("cannot be written" in error and "free some space" in error) or "interrupted" in error
    assert helpers.fingerprint(tmp_path) == before and not list(tmp_path.glob(".*"))
    assert (tmp_path / "out").is_dir()


def test_an_interrupted_run_is_cleared(hf: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("left by a process that was killed")
    (tmp_path / "out").mkdir()
    assert to_t5x(hf, tmp_path / "out", "--to", "orbax") == 0
    assert not (tmp_path / "out" / "old").exists() and not (tmp_path / ".out.partial").exists()
    assert_same(open_checkpoint(tmp_path / "out"), open_checkpoint(hf))
