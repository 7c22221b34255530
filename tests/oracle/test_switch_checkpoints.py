"""Hugging Face directories of Switch Transformers: what is read, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common import CheckpointError, build_store
from common.checkpoints import open_checkpoint
from tests import helpers, switch_models

EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(switch_models.random_switch(0), tmp_path_factory.mktemp("switch") / "good")


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path / "model.safetensors")


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(
            json.dumps({k: v for k, v in raw.items() if v is not ...})
        )

    return apply


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda p: edit_tensors(p, lambda t: t.pop(EXPERT)),
        f"tensor {EXPERT} is missing",
    ),
    "wrong axis order": (
        lambda p: edit_tensors(p, lambda t: t.update({EXPERT: t[EXPERT].T})),
        rf"tensor {EXPERT} is \[32, 64\], config.json implies \[64, 32\]",
    ),
    "extra tensor": (
        lambda p: edit_tensors(p, lambda t: t.update({"encoder.block.9.x": t[EXPERT]})),
        r"1 tensors that a Switch Transformer of this config does not have, first "
        r"'encoder.block.9.x'",
    ),
    "more experts than tensors": (
        config(num_experts=5),
        "router.classifier.weight is .4, 32., config.json implies",
    ),
    "no experts": (
        config(encoder_sparse_step=0, decoder_sparse_step=0),
        "leaves no sparse layer; a model without experts has none to share",
    ),
    "no d_model": (config(d_model=...), "implies \\[96, 768\\]; .*defaults taken: d_model 768"),
    "activation": (config(dense_act_fn="tanh"), "field 'dense_act_fn' is 'tanh'; supported: relu"),
    "router dtype": (
        config(router_dtype="int8"),
        "field 'router_dtype' is 'int8'; supported: float32",
    ),
    "start token": (
        config(decoder_start_token_id=96),
        "field 'decoder_start_token_id' is 96; expected a token id below 96",
    ),
    "buckets": (config(relative_attention_num_buckets=7), "buckets must be even"),
    "sparse step": (
        config(encoder_sparse_step="2"),
        "field 'encoder_sparse_step' is '2'; expected a whole number",
    ),
    "sparse layers": (
        config(moetel_sparse_layers={"encoder": [1], "decoder": [5]}),
        "expected ascending layer numbers for 'encoder' and 'decoder'",
    ),
    "quantised": (
        config(quantization_config={"bits": 4}),
        "quantised checkpoints are not supported",
    ),
    "truncated": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:-100]
        ),
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_directories_are_refused_by_name(good: Path, tmp_path: Path, kind: str) -> None:
    damage, message = BAD[kind]
    path = Path(shutil.copytree(good, tmp_path / "bad"))
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        build_store(tmp_path / "store", {"good": good, "bad": path})
    assert not (tmp_path / "store").exists()


def test_not_finite_weights_are_refused_by_name(good: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(good, tmp_path / "bad"))
    edit_tensors(path, lambda t: t[EXPERT].__setitem__((3, 4), np.nan))
    with pytest.raises(CheckpointError, match=f"tensor {EXPERT} of tenant 'bad' holds NaN"):
        build_store(tmp_path / "store", {"bad": path})


def test_tensors_are_hugging_faces(good: Path) -> None:
    theirs = switch_models.random_switch(0).state_dict()
    ours = dict(open_checkpoint(good).stream())
    assert all(np.array_equal(array, theirs[name].numpy()) for name, array in ours.items())
    assert {n for n in theirs if n not in ours} == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }  # tied: one of the four is kept


def test_what_older_versions_saved_beside_is_not_needed(good: Path, tmp_path: Path) -> None:
    """transformers 4 wrote tied tables again, and a bias that no layer uses."""
    path = Path(shutil.copytree(good, tmp_path / "old"))
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    def add(tensors: dict[str, np.ndarray]) -> None:
        for name in ("encoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors["shared.weight"]
        tensors[unused] = np.zeros((8, 4), np.float32)

    edit_tensors(path, add)
    assert list(open_checkpoint(path).tensors) == list(open_checkpoint(good).tensors)


def test_families_do_not_mix(good: Path, tmp_path: Path) -> None:
    other = helpers.save(helpers.random_mixtral(0), tmp_path / "mixtral")
    from common import StoreError

    with pytest.raises(
        StoreError, match=r"cannot share experts \(family: switch_transformers != mixtral\);"
    ):
        build_store(tmp_path / "store", {"a": good, "b": other})


def test_sparse_layers_that_hugging_face_cannot_say_are_not_exported(good: Path) -> None:
    family = open_checkpoint(good).family
    raw = json.loads((good / "config.json").read_text()) | {
        "num_layers": 4,
        "moetel_sparse_layers": {"encoder": [0, 3], "decoder": [1]},
    }
    parsed = family.parse_config(raw, "config.json")
    assert parsed.experts.expert_layers[:2] == (
        "encoder.block.0.layer.1.mlp",
        "encoder.block.3.layer.1.mlp",
    )
    with pytest.raises(
        CheckpointError,
        match=r"sparse encoder layers \[0, 3\] of 4 .* keep this model as T5X or Orbax",
    ):
        family.hf_config(parsed, "float32")
