"""Adapters that cannot be read are refused by file, field or tensor; where a base is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoints import Checkpoint, open_checkpoint
from common.errors import CheckpointError
from tests import checkpoints
from tests.common.checkpoints.adapters import PREFIX, W1, Q, tensors, write

A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.random_mixtral(1), tmp_path_factory.mktemp("peft") / "base")


def opened(path: Path, base: Path | None) -> Checkpoint:
    return open_checkpoint(path, base=base)


def test_what_an_adapter_leaves_alone_is_the_bases_own(base: Path, tmp_path: Path) -> None:
    found = opened(write(tmp_path / "it"), base)
    assert found.base is not None
    before = found.base.tensors
    changed = {name for name, ref in found.tensors.items() if ref is not before[name]}
    names = [f"{m.removeprefix('base_model.model.')}.weight" for m in (Q, W1)]
    assert changed == set(names)
    given = tensors()
    for module, name in zip((Q, W1), names, strict=True):
        expected = before[name].read() + 6 / 4 * given[f"{module}.{B}"] @ given[f"{module}.{A}"]
        np.testing.assert_allclose(found.tensors[name].read(), expected, rtol=0, atol=1e-6)


def changed_tensors(**changes: Any) -> Callable[[Path], Path]:
    """An adapter of which tensors are put in, or taken out by None."""

    def make(path: Path) -> Path:
        found = tensors() | changes
        return write(path, {k: v for k, v in found.items() if v is not None})

    return make


def config(**changes: Any) -> Callable[[Path], Path]:
    return lambda path: write(path, **changes)


def truncated(path: Path) -> Path:
    file = write(path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return path


def pickle_alone(path: Path) -> Path:
    (write(path) / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    return path


def no_weights(path: Path) -> Path:
    (write(path) / "adapter_model.safetensors").unlink()
    return path


def broken_config(path: Path) -> Path:
    (write(path) / "adapter_config.json").write_text("{")
    return path


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


MERGED = r"merge the adapter into its base with PEFT"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "broken config": (broken_config, r"adapter_config.json: cannot be read as JSON"),
    "another method": (config(peft_type="LOHA"), rf"field 'peft_type' is 'LOHA'.*{MERGED}"),
    "no method": (config(peft_type=...), r"field 'peft_type' is None"),
    "DoRA": (config(use_dora=True), rf"field 'use_dora' is True.*DoRA.*{MERGED}"),
    "DoRA's tensors": (
        changed_tensors(**{f"{Q}.lora_magnitude_vector": zeros(32)}),
        rf"adapter_model.safetensors: tensor {Q}.lora_magnitude_vector is DoRA's.*{MERGED}",
    ),
    "PiSSA": (
        config(init_lora_weights="pissa"),
        r"'init_lora_weights' is 'pissa'.*path_initial_model_for_weight_conversion",
    ),
    "rows of embeddings": (
        config(trainable_token_indices=[1, 2]),
        r"field 'trainable_token_indices' is \[1, 2\]",
    ),
    "repeated layers": (config(layer_replication=[[0, 1]]), r"field 'layer_replication' is"),
    "classification": (config(task_type="SEQ_CLS"), r"field 'task_type' is 'SEQ_CLS'"),
    "unknown setting": (config(use_magic=True), r"field 'use_magic' is True, a field not known"),
    "rank of 0": (config(r=0), r"field 'r' is 0, expected a whole number from 1"),
    "alpha of text": (config(lora_alpha="6"), r"field 'lora_alpha' is '6', expected a number"),
    "broken pattern": (config(rank_pattern={"(": 2}), r"field 'rank_pattern' holds '\('"),
    "names that are none": (config(target_parameters=[3]), r"field 'target_parameters' is \[3\]"),
    "layers that are none": (config(layers_to_transform="x"), r"field 'layers_to_transform'"),
    "other rank": (
        config(r=8),
        rf"tensor {Q}.{A} is \[4, 32\], but field 'r' .* rank 8, which makes \[8, 32\]",
    ),
    "other rank by a pattern": (
        config(rank_pattern={"w1": 3}),
        rf"tensor {W1}.{A} is \[4, 32\], but field 'rank_pattern' .* rank 3",
    ),
    "rank of one factor": (
        changed_tensors(**{f"{Q}.{B}": zeros(32, 5)}),
        rf"tensor {Q}.{B} is \[32, 5\], but field 'r'",
    ),
    "base of other shapes": (
        changed_tensors(**{f"{Q}.{A}": zeros(4, 48)}),
        rf"tensor {Q}.{A} is \[4, 48\], but model.layers.0.self_attn.q_proj.weight of the base "
        r"\S+base needs \[4, 32\]; give the base that the adapter was trained on",
    ),
    "unknown module": (
        changed_tensors(**{f"{PREFIX}0.mlp.fc1.{A}": zeros(4, 32)}),
        r"is for a module model.layers.0.mlp.fc1 that a Mixtral like \S+ does not have",
    ),
    "layer that is not there": (
        changed_tensors(**{f"{PREFIX}7.self_attn.q_proj.{A}": zeros(4, 32)}),
        r"is for a module model.layers.7.self_attn.q_proj that",
    ),
    "module that is not named": (
        config(target_modules=["w1"]),
        rf"tensor {Q}.{A} is for .*q_proj, which neither 'target_modules' nor",
    ),
    "module that is excluded": (config(exclude_modules=["q_proj"]), r"which neither"),
    "layer that is left out": (config(layers_to_transform=[1]), r"which neither"),
    "one factor": (changed_tensors(**{f"{Q}.{B}": None}), rf"has no {B} of its own"),
    "adapted norm": (
        changed_tensors(
            **{f"{PREFIX}0.input_layernorm.{A}": zeros(4, 32)},
            **{f"{PREFIX}0.input_layernorm.{B}": zeros(32, 4)},
        ),
        r"which neither",
    ),
    "unknown tensor": (
        changed_tensors(**{f"{PREFIX}0.extra.weight": zeros(3)}),
        rf"tensor {PREFIX}0.extra.weight is for no tensor of a Mixtral",
    ),
    "an adapter's name within": (
        changed_tensors(**{f"{Q}.lora_A.default.weight": zeros(4, 32)}),
        rf"tensor {Q}.lora_A.default.weight is not named as PEFT saves.*save_pretrained",
    ),
    "grown vocabulary": (
        changed_tensors(**{"base_model.model.lm_head.weight": zeros(99, 32)}),
        r"lm_head.weight is \[99, 32\], the base \S+ has \[96, 32\].*embeddings resized",
    ),
    "module to save that is not": (
        config(modules_to_save=["lm_head"]),
        r"field 'modules_to_save' names 'lm_head', of which",
    ),
    "bias without one": (
        changed_tensors(**{f"{Q}.lora_B.bias": zeros(32)}),
        r"field 'lora_bias' is true, and tensor \S+ is for a bias that \S+ does not have",
    ),
    "truncated": (truncated, r"adapter_model.safetensors: not a whole safetensors file"),
    "pickle alone": (pickle_alone, r"adapter_model.bin: is a pickle, .* never read.*safetensors"),
    "no weights": (no_weights, r"adapter_model.safetensors: the file is missing"),
    "integers": (
        changed_tensors(**{f"{Q}.{A}": np.zeros((4, 32), np.int64)}),
        rf"tensor {Q}.{A} has type I64",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_what_is_at_fault(kind: str, base: Path, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(make(tmp_path / "it"), base)
    assert str(caught.value).startswith(str(tmp_path / "it"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_named_when_they_are_read(
    value: float, base: Path, tmp_path: Path
) -> None:
    found = tensors()
    found[f"{W1}.{B}"][3, 1] = value
    checkpoint = opened(write(tmp_path / "it", found), base)
    message = rf"adapter_model.safetensors: tensor {W1}.{B} holds NaN or infinite"
    with pytest.raises(CheckpointError, match=message):
        list(checkpoint.stream())


def test_a_base_for_a_whole_model_and_a_config_for_an_adapter_are_refused(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"a whole model, no adapter; a base"):
        open_checkpoint(base, base=base)
    with pytest.raises(CheckpointError, match=r"an adapter, which has its base's config.json"):
        open_checkpoint(write(tmp_path / "it"), base / "config.json")


def test_an_adapter_is_no_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an adapter itself, and cannot be the base"):
        opened(write(tmp_path / "it"), write(tmp_path / "other"))


# Where a base is found.


def copied(base: Path, to: Path) -> Path:
    return Path(shutil.copytree(base, to))


@pytest.mark.parametrize("name", ["../base", "some/base", "/gone/base", "base"])
def test_a_base_beside_its_adapter(name: str, base: Path, tmp_path: Path) -> None:
    copied(base, tmp_path / "base")
    found = opened(write(tmp_path / "it", base_model_name_or_path=name), None)
    assert found.base is not None and found.base.path.resolve() == tmp_path / "base"


def test_a_base_within_its_adapter_and_from_the_current_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(base, write(tmp_path / "it", base_model_name_or_path="inner") / "inner")
    found = opened(tmp_path / "it", None)
    assert found.base is not None and found.base.path == tmp_path / "it" / "inner"
    monkeypatch.chdir(copied(base, tmp_path / "here" / "model").parent)
    found = opened(write(tmp_path / "other", base_model_name_or_path="model"), None)
    assert found.base is not None and found.base.path.resolve() == tmp_path / "here" / "model"


def test_a_base_of_the_same_command(base: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(copied(base, tmp_path / "models" / "some" / "mixtral"))
    path = write(tmp_path / "adapters" / "it", base_model_name_or_path="some/mixtral")
    found = open_checkpoint(path, beside={whole.path.resolve(): whole})
    assert found.base is whole


def test_a_base_in_the_hubs_cache(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--mixtral"
    snapshot = copied(base, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    path = write(tmp_path / "it", base_model_name_or_path="some/mixtral")
    found = opened(path, None)
    assert found.base is not None and found.base.path == snapshot
    found = opened(write(tmp_path / "it", base_model_name_or_path=None), Path("some/mixtral"))
    assert found.base is not None and found.base.path == snapshot
    path = write(tmp_path / "it", base_model_name_or_path="some/mixtral", revision="v2")
    with pytest.raises(CheckpointError, match=r"names 'some/mixtral', which is neither"):
        opened(path, None)


def test_a_base_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, message in (
        ("some/mixtral", r"field 'base_model_name_or_path' names 'some/mixtral'.*--base.*fetch it"),
        ("/gone/away", r"names '/gone/away', which is neither"),
        (None, r"field 'base_model_name_or_path' is empty; name the adapter's base with --base"),
    ):
        path = write(tmp_path / "it", base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=message):
            opened(path, None)
    with pytest.raises(
        CheckpointError, match=r"away: no such directory, nor .*; give the adapter's base"
    ):
        opened(path, tmp_path / "away")


# What travels with it.


def test_small_files_are_the_adapters_where_it_has_them(base: Path, tmp_path: Path) -> None:
    whole = copied(base, tmp_path / "base")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (whole / name).write_text("{}")
    path = write(tmp_path / "it")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    found = opened(path, None)
    assert found.assets["generation_config.json"] == path / "generation_config.json"
    assert found.assets["tokenizer.json"] == tmp_path / "base" / "tokenizer.json"
    # A tokenizer is taken as a whole: files of two would be none.
    (path / "tokenizer.model").write_bytes(b"")
    found = opened(path, None)
    assert found.assets["tokenizer.model"] == path / "tokenizer.model"
    assert "tokenizer.json" not in found.assets and "special_tokens_map.json" not in found.assets
    assert found.assets["config.json"] == tmp_path / "base" / "config.json"


def test_names_without_peft_s_prefix(base: Path, tmp_path: Path) -> None:
    """As some trainers save them, and those of a model without its head."""
    for prefix in ("", "base_model.model."):
        for cut in ("base_model.model.", "base_model.model.model."):
            given = {prefix + k.removeprefix(cut): v for k, v in tensors().items()}
            found = opened(write(tmp_path / "it", given), base)
            assert found.base is not None
            moved = [n for n, ref in found.tensors.items() if ref is not found.base.tensors[n]]
            assert len(moved) == 2
