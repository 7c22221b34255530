"""T5X directories: read as t5x writes them, written as t5x reads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from common import CheckpointError, build_store
from common.checkpoints import (
    open_checkpoint,
    write_t5x,
)
from common.families.switch_transformers import shape_of
from tests import helpers, switch
from tests.helpers import shared_path
from tests.oracle.checkpoints.t5x.same import WI, assert_same

FIXTURES = "fixtures/switch_tiny"


def test_fixture_equals_the_hugging_face_one() -> None:
    found = open_checkpoint(shared_path(f"{FIXTURES}/t5x/checkpoint_1000"))
    expected = open_checkpoint(shared_path(f"{FIXTURES}/hf"))
    assert_same(found, expected)
    told = (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_experts",
        "num_layers",
        "num_decoder_layers",
    )
    more = (
        "relative_attention_num_buckets",
        "tie_word_embeddings",
        "router_bias",
        "num_sparse_encoder_layers",
    )
    for field in (*told, *more, "encoder_sparse_step", "decoder_sparse_step", "dense_act_fn"):
        assert found.config.raw[field] == expected.config.raw[field], field
    assert (
        "relative_attention_max_distance 128" in found.notes[0]
        and "vocab_size" not in found.notes[0]
    )
    # The fixture's real distance is 16, which no shape tells.
    given = open_checkpoint(found.path, shared_path(f"{FIXTURES}/hf/config.json"))
    assert given.config == expected.config and given.notes == ()


def test_fixture_as_a_bucket_left_it(tmp_path: Path) -> None:
    copy = shutil.copytree(
        shared_path(f"{FIXTURES}/t5x/checkpoint_1000"), tmp_path / "checkpoint_1000"
    )
    shutil.copy(shared_path(f"{FIXTURES}/t5x_gcs_header/checkpoint"), copy / "checkpoint")
    assert_same(open_checkpoint(copy), open_checkpoint(shared_path(f"{FIXTURES}/hf")))


def test_fixture_in_bfloat16() -> None:
    found = open_checkpoint(shared_path(f"{FIXTURES}/t5x_bf16/checkpoint_1000"))
    expected = open_checkpoint(shared_path(f"{FIXTURES}/hf"))
    assert found.dtype == "bfloat16"
    for name, array in expected.stream():
        assert np.array_equal(found.tensors[name].read(), array.astype(ml_dtypes.bfloat16)), name


def test_what_is_written_equals_t5x_own_files(tmp_path: Path) -> None:
    """With the fixture's chunk size, every file that t5x wrote: chunks, .zarray and index, byte for
    byte."""
    source = open_checkpoint(shared_path(f"{FIXTURES}/hf"))
    (tmp_path / "bf16").mkdir()
    write_t5x(tmp_path / "bf16", source, step=1000, dtype="bfloat16", chunk_bytes=4096)
    expected = helpers.fingerprint(shared_path(f"{FIXTURES}/t5x_bf16/checkpoint_1000"))
    assert helpers.fingerprint(tmp_path / "bf16") == expected
    (tmp_path / "fp32").mkdir()
    write_t5x(tmp_path / "fp32", source, step=1000, chunk_bytes=4096)
    full = shared_path(f"{FIXTURES}/t5x/checkpoint_1000")
    arrays = {n: h for n, h in helpers.fingerprint(full).items() if n.startswith("target.")}
    assert {
        n: h for n, h in helpers.fingerprint(tmp_path / "fp32").items() if n != "checkpoint"
    } == arrays
    mine, theirs = (switch.load_index(p)["optimizer"] for p in (tmp_path / "fp32", full))
    assert (
        mine["target"] == theirs["target"]
        and mine["state"]["step"] == theirs["state"]["step"] == 1000
    )


@pytest.mark.parametrize("variant", switch.VARIANTS)
def test_every_shape_is_found(variant: str, tmp_path: Path) -> None:
    """T5X's files made by flax and TensorStore from a Hugging Face model, against that model's own
    directory."""
    model = switch.random_switch(**switch.VARIANTS[variant])
    model.save_pretrained(tmp_path / "hf")
    path = switch.write_t5x(
        tmp_path / "checkpoint_3", switch.t5x_parameters(switch.arrays_of(model))
    )
    found, expected = open_checkpoint(path), open_checkpoint(tmp_path / "hf")
    assert_same(found, expected)
    assert found.config.experts == expected.config.experts
    mine, theirs = shape_of(found.config), shape_of(expected.config)
    # The one thing that no shape of an array tells, see `open_checkpoint`'s notes.
    told = replace(mine.attention, positions=theirs.attention.positions)
    assert replace(mine, attention=told) == theirs
    assert open_checkpoint(path, tmp_path / "hf").config.raw == expected.config.raw


@pytest.mark.parametrize("variant", switch.VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    """What we write, flax and TensorStore see as T5X's tree of that model; and we read it back bit
    for bit."""
    model = switch.random_switch(1, **switch.VARIANTS[variant])
    model.save_pretrained(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    (tmp_path / "t5x").mkdir()
    steps = []
    write_t5x(tmp_path / "t5x", source, step=12, on_tensor=lambda: steps.append(1))
    assert len(steps) == len(source.tensors)
    switch.write_t5x(tmp_path / "oracle", switch.t5x_parameters(switch.arrays_of(model)))
    oracle, mine = (switch.load_index(tmp_path / p)["optimizer"] for p in ("oracle", "t5x"))
    assert mine["state"]["step"] == 12 and mine["state"]["step"].dtype == np.int32

    def shapes(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: v["metadata"]["shape"] if "driver" in v else shapes(v) for k, v in tree.items()}

    assert shapes(mine["target"]) == shapes(oracle["target"])
    assert_same(open_checkpoint(tmp_path / "t5x"), source)


def test_gated(tmp_path: Path) -> None:
    source = open_checkpoint(switch.gated_directory(tmp_path / "hf"))
    (tmp_path / "t5x").mkdir()
    write_t5x(tmp_path / "t5x", source)
    found = open_checkpoint(tmp_path / "t5x")
    assert_same(found, source)
    assert shape_of(found.config).experts.gated and found.config.experts.activation == "gelu_new"
    assert {p.name for p in (tmp_path / "t5x").glob("target.encoder.layers_1.mlp.expert.*")} == {
        f"target.encoder.layers_1.mlp.expert.{p}.kernel" for p in ("wi_0", "wi_1", "wo")
    }


@pytest.mark.parametrize(
    "options", [{"old_paths": True}, {"inline": "scale"}, {"inline": "kernel"}]
)
def test_other_leaves(
    options: dict[str, Any], parameters: dict[str, np.ndarray], tmp_path: Path
) -> None:
    expected = open_checkpoint(switch.write_t5x(tmp_path / "plain", parameters))
    assert_same(
        open_checkpoint(switch.write_t5x(tmp_path / "other", parameters, **options)), expected
    )


def test_version_2_keeps_bfloat16_as_integers(
    parameters: dict[str, np.ndarray], tmp_path: Path
) -> None:
    narrow = {n: a.astype(ml_dtypes.bfloat16) for n, a in parameters.items()}
    path = switch.write_t5x(tmp_path / "old", {n: a.view(np.uint16) for n, a in narrow.items()})
    with pytest.raises(CheckpointError, match=r"array target\.\S+ has type uint16"):
        open_checkpoint(path)
    switch.save_index(path, switch.load_index(path) | {"version": 2})
    assert_same(open_checkpoint(path), open_checkpoint(switch.write_t5x(tmp_path / "new", narrow)))


def test_untied_tables_that_differ_cannot_be_written(tmp_path: Path) -> None:
    model = switch.random_switch(tie_word_embeddings=False)
    model.decoder.embed_tokens.weight.data += 1
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "t5x").mkdir()
    with pytest.raises(
        CheckpointError, match=r"decoder.embed_tokens.weight differs from shared.weight"
    ):
        write_t5x(tmp_path / "t5x", open_checkpoint(tmp_path / "hf"))


def test_float16_is_widened(tmp_path: Path) -> None:
    switch.random_switch().half().save_pretrained(tmp_path / "hf")
    (tmp_path / "t5x").mkdir()
    write_t5x(tmp_path / "t5x", open_checkpoint(tmp_path / "hf"))
    assert open_checkpoint(tmp_path / "t5x").dtype == "float32"


# Directories


def test_run_directories(checkpoint: Path) -> None:
    run = checkpoint.parent
    (run / "checkpoint_9.tmp-1700000000").mkdir()
    assert open_checkpoint(run).path == checkpoint
    shutil.copytree(checkpoint, run / "checkpoint_10")
    with pytest.raises(
        CheckpointError, match=r"holds 2 checkpoints; give one of them: checkpoint_3, checkpoint_10"
    ):
        open_checkpoint(run)
    unfinished = checkpoint.rename(run / "checkpoint_11.tmp-1700000000")
    with pytest.raises(CheckpointError, match="was not finished"):
        open_checkpoint(unfinished)
    (run / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: is empty; expected .*T5X"):
        open_checkpoint(run / "empty")


@pytest.mark.parametrize("module", ["tensorstore", "msgpack"])
def test_without_its_packages(
    module: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        CheckpointError, match=rf"need the package {module}, .* pip install 'moetel\[jax\]'"
    ):
        open_checkpoint(checkpoint)


def test_reading_imports_no_framework(checkpoint: Path) -> None:
    code = (
        "import sys; from common.checkpoints import open_checkpoint; c = "
        f"open_checkpoint({str(checkpoint)!r}); "
        "[a for a in c.stream()]; print([m for m in ('torch', 'jax', 'flax', 'orbax') if m in "
        "sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=helpers.REPOSITORY,
    )
    assert out.stdout.strip() == "[]"


# Stores and memory


def test_stores_take_them(checkpoint: Path, tmp_path: Path) -> None:
    """A tenant from T5X and the same from Hugging Face are one copy of everything; a NaN is refused
    by T5X's name."""
    switch.random_switch().save_pretrained(tmp_path / "hf")
    store = build_store(tmp_path / "store", {"t5x": checkpoint, "hf": tmp_path / "hf"})
    assert store.tenant("t5x").tensors == store.tenant("hf").tensors
    broken = switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    broken[WI] = broken[WI].copy()
    broken[WI][2, 0, 0] = np.nan
    shutil.rmtree(checkpoint)
    switch.write_t5x(checkpoint, broken)
    with pytest.raises(CheckpointError, match=rf"tensor target.{WI}\[2\] of tenant 'a' holds NaN"):
        build_store(tmp_path / "other", {"a": checkpoint})
