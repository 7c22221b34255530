"""T5X directories: read as t5x writes them, written as t5x reads them; configs found from shapes;
damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from common import CheckpointError, build_store
from common.checkpoints import (
    Checkpoint,
    open_checkpoint,
    read_asset,
    t5x_names,
    tensorstore_array,
    write_t5x,
)
from common.checkpoints.t5x_config import sparse_step
from common.checkpoints.tensorstore_array import even_chunks
from common.families.shape import EncoderDecoder, RelativePositions
from common.families.switch_transformers import as_switch
from tests import helpers, switch
from tests.helpers import shared_path

FIXTURES = "fixtures/switch_tiny"


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """Every canonical tensor bit for bit."""
    assert set(found.tensors) == set(expected.tensors)
    for name, array in expected.stream():
        mine = found.tensors[name].read()
        assert (
            mine.flags.c_contiguous and mine.dtype == array.dtype and mine.shape == array.shape
        ), name
        assert mine.shape == found.tensors[name].shape and mine.nbytes == found.tensors[name].nbytes
        assert mine.tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    return switch.t5x_parameters(switch.arrays_of(switch.random_switch()))


@pytest.fixture
def checkpoint(parameters: dict[str, np.ndarray], tmp_path: Path) -> Path:
    return switch.write_t5x(tmp_path / "checkpoint_3", parameters)


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
    mine, theirs = as_switch(found.config), as_switch(expected.config)
    for field in theirs.__dataclass_fields__:
        if field not in ("raw", "shape", "relative_attention_max_distance"):
            assert getattr(mine, field) == getattr(theirs, field), field
    # The one thing that no shape of an array tells, see `open_checkpoint`'s notes.
    distance = theirs.relative_attention_max_distance
    positions = RelativePositions(theirs.relative_attention_num_buckets, distance)
    assert isinstance(mine.shape, EncoderDecoder)
    told = replace(mine.shape.attention, positions=positions)
    assert replace(mine.shape, attention=told) == theirs.shape
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
    assert as_switch(found.config).gated and found.config.experts.activation == "gelu_new"
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


# Configs


def moved_experts(parameters: dict[str, np.ndarray], layers: int = 6) -> dict[str, np.ndarray]:
    """A tree of 6 encoder layers with experts in 2 and 5, as flaxformer places them; transformers
    would say 1 and 4."""
    found = {n: a for n, a in parameters.items() if not n.startswith("encoder.layers_")}
    for i in range(layers):
        source = "encoder.layers_1." if i % 3 == 2 else "encoder.layers_0."
        found |= {
            n.replace(source, f"encoder.layers_{i}."): a
            for n, a in parameters.items()
            if n.startswith(source)
        }
    return found


def test_sparse_layers_that_transformers_has_no_rule_for(
    parameters: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = switch.write_t5x(tmp_path / "checkpoint_3", moved_experts(parameters))
    found = open_checkpoint(path)
    assert as_switch(found.config).sparse_layers == {"encoder": (2, 5), "decoder": (1, 3)}
    assert found.config.raw["moetel_sparse_layers"] == {"encoder": [2, 5], "decoder": [1, 3]}
    assert found.config.experts.num_layers == 4
    with pytest.raises(CheckpointError, match=r"sparse encoder layers \[2, 5\]"):
        found.family.hf_config(found.config, "float32")
    # A config for transformers that has as many sparse layers is believed but for where they are.
    config = switch.random_switch(num_layers=6).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    given = open_checkpoint(path, tmp_path / "config.json")
    assert as_switch(given.config).sparse_layers == {"encoder": (2, 5), "decoder": (1, 3)}
    assert given.config.raw["relative_attention_max_distance"] == 20
    assert any(
        "sparse encoder layers are [2, 5]" in note and "mean [1, 4]" in note for note in given.notes
    )
    config["moetel_sparse_layers"] = {"encoder": [2, 5], "decoder": [1, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_checkpoint(path, tmp_path).notes == ()
    config["moetel_sparse_layers"]["encoder"] = [1, 5]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'moetel_sparse_layers' .* encoder layers \[1, 5\]"):
        open_checkpoint(path, tmp_path)


@pytest.mark.parametrize(
    ("sparse", "num_layers", "step"),
    [
        ((), 3, 0),
        ((0, 1), 2, 1),
        ((0,), 1, 1),
        ((1, 3), 4, 2),
        ((1,), 4, 4),
        ((1, 4), 6, 3),
        ((2, 5), 6, None),
    ],
)
def test_steps_are_those_of_transformers(
    sparse: tuple[int, ...], num_layers: int, step: int | None
) -> None:
    assert sparse_step(sparse, num_layers) == step


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("vocab_size", 50, r"48 \(target.token_embedder.embedding is \[48, 16\]\)"),
        ("d_model", 32, r"16 \(target.token_embedder.embedding is \[48, 16\]\)"),
        ("hidden_size", 32, r"16 \(target.token_embedder"),
        ("d_kv", 8, r"4 \(target.encoder.layers_0.attention.query.kernel is \[16, 16\], 4 heads\)"),
        ("d_ff", 64, r"24 \(target.decoder.layers_0.mlp.wi.kernel is \[16, 24\]\)"),
        ("num_layers", 12, r"4 \(4 layers in target.encoder\)"),
        ("num_decoder_layers", 2, r"4 \(4 layers in target.decoder\)"),
        ("num_heads", 8, r"4 \(target.encoder.relpos_bias.rel_embedding is \[4, 8\]\)"),
        (
            "num_experts",
            8,
            r"4 \(target.encoder.layers_1.mlp.router.router_weights.w.kernel is \[16, 4\]\)",
        ),
        ("relative_attention_num_buckets", 32, r"8 \(target.encoder.relpos_bias"),
        ("tie_word_embeddings", False, r"True \(target.decoder.logits_dense.kernel is absent\)"),
        (
            "router_bias",
            True,
            r"False \(target.encoder.layers_1.mlp.router.router_weights.w.bias is absent\)",
        ),
        ("num_sparse_encoder_layers", 4, r"experts \(mlp.expert\) in layers \[1, 3\] of 4"),
        ("decoder_sparse_step", 1, r"makes the decoder layers \[0, 1, 2, 3\] sparse"),
        ("feed_forward_proj", "gated-gelu", r"wi alone \(not gated\)"),
        ("is_gated_act", True, r"wi alone \(not gated\)"),
        ("model_type", "mixtral", r"the checkpoint holds a Switch Transformer"),
        ("num_heads", "four", r"'num_heads' is 'four', but the checkpoint has 4"),
        ("expert_capacity", -1, r"'expert_capacity' is -1; expected a whole number"),
    ],
)
def test_configs_that_contradict(
    field: str, value: Any, found: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({field: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=found) as caught:
        open_checkpoint(checkpoint, tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)
    assert repr(value) in str(caught.value)


def test_config_fields_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """In the checkpoint's own directory, or named; null stays null; what is not ours travels
    along."""
    raw = {
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": None,
        "n_positions": 512,
        "task_specific_params": {"a": 1},
    }
    (checkpoint / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    (checkpoint / "spiece.model").write_bytes(b"pieces")
    found = open_checkpoint(checkpoint)
    assert raw.items() <= found.config.raw.items()
    assert as_switch(found.config).layer_norm_epsilon == 1e-5
    assert set(found.assets) == {"config.json", "spiece.model"}
    assert "epsilon" not in found.notes[0] and "eos" not in found.notes[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"layer_norm_epsilon": 1e-4}), encoding="utf-8")
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    named = open_checkpoint(checkpoint, other)
    assert as_switch(named.config).layer_norm_epsilon == 1e-4
    assert json.loads(read_asset(named.assets["config.json"])) == named.config.raw
    assert (
        named.assets["tokenizer.json"] == other / "tokenizer.json"
        and "spiece.model" in named.assets
    )
    with pytest.raises(CheckpointError, match=r"nowhere.json: no such file"):
        open_checkpoint(checkpoint, tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match=r"checkpoint_3/config.json: no such file"):
        (checkpoint / "config.json").unlink()
        open_checkpoint(checkpoint, checkpoint)


def test_a_config_for_a_hugging_face_directory_is_refused(tmp_path: Path) -> None:
    switch.random_switch().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has its own config\.json"):
        open_checkpoint(tmp_path, tmp_path / "config.json")


def test_gated_configs(tmp_path: Path) -> None:
    source = open_checkpoint(switch.gated_directory(tmp_path / "hf"))
    path = tmp_path / "t5x"
    path.mkdir()
    write_t5x(path, source)
    (path / "config.json").write_text(json.dumps({"dense_act_fn": "silu"}), encoding="utf-8")
    found = open_checkpoint(path)
    assert found.config.experts.activation == "silu" and as_switch(found.config).gated
    (path / "config.json").write_text(json.dumps({"feed_forward_proj": "relu"}), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"'feed_forward_proj' is 'relu', .* wi_0 and wi_1 \(gated\)"
    ):
        open_checkpoint(path)


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


# Damage


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = switch.load_index(path)
    switch.save_index(path, change(tree) or tree)


def reshape(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write one array anew, in another shape."""
    parameters = switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    shutil.rmtree(path)
    switch.write_t5x(path, parameters | {name: change(parameters[name])})


WI = "encoder.layers_1.mlp.expert.wi.kernel"
Q = "decoder.layers_0.self_attention.query.kernel"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "array missing": (
        lambda p: shutil.rmtree(p / f"target.{Q}"),
        rf"target.{Q}: array target.{Q} is named in .*/checkpoint but missing",
    ),
    "array metadata damaged": (
        lambda p: (p / f"target.{Q}/.zarray").write_text("{"),
        rf"array target.{Q} cannot be opened",
    ),
    "experts last": (
        lambda p: reshape(p, WI, lambda a: np.ascontiguousarray(a.transpose(1, 2, 0))),
        rf"array target.{WI} is \[16, 24, 4\], .* imply \[4, 16, 24\]; its axes are in another "
        r"order",
    ),
    "kernel of another size": (
        lambda p: reshape(p, Q, lambda a: a[:, :8]),
        rf"array target.{Q} is \[16, 8\], the other arrays imply \[16, 16\]; the arrays belong to "
        r"different models",
    ),
    "one axis too few": (
        lambda p: reshape(p, "token_embedder.embedding", lambda a: a[0]),
        r"target.token_embedder.embedding is \[16\], expected 2 axes",
    ),
    "heads that divide nothing": (
        lambda p: reshape(p, "encoder.relpos_bias.rel_embedding", lambda a: a[:3]),
        r"has 16 columns, which 3 heads .* do not divide",
    ),
    "integers": (
        lambda p: reshape(p, Q, lambda a: a.astype(np.int32)),
        rf"array target.{Q} has type int32",
    ),
    "inline integers": (
        lambda p: edit(
            p,
            lambda t: t["optimizer"]["target"]["encoder"]["encoder_norm"].update(
                scale=np.arange(16)
            ),
        ),
        r"checkpoint: array target.encoder.encoder_norm.scale has type int64",
    ),
    "optimizer state alone": (
        lambda p: edit(p, lambda t: t["optimizer"].pop("target") and None),
        r"holds no parameters: 'optimizer' has \['state'\], no 'target'",
    ),
    "no optimizer": (lambda p: edit(p, lambda t: {"version": 3}), r"holds no parameters"),
    "newer version": (
        lambda p: edit(p, lambda t: t | {"version": 4}),
        r"has format version 4; .* reads 2 and 3",
    ),
    "no version": (
        lambda p: edit(p, lambda t: {"optimizer": t["optimizer"]}),
        r"has format version None",
    ),
    "no msgpack": (
        lambda p: (p / "checkpoint").write_bytes(b"\xc1 nothing"),
        r"checkpoint: no msgpack index",
    ),
    "a list": (lambda p: switch.save_index(p, [1, 2]), r"checkpoint: holds list, expected a tree"),
    "truncated index": (
        lambda p: (p / "checkpoint").write_bytes((p / "checkpoint").read_bytes()[:-40]),
        r"checkpoint: no msgpack index .* truncated or damaged",
    ),
    "TensorFlow": (
        lambda p: (p / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-1000"\n'),
        r"belongs to a TensorFlow checkpoint",
    ),
    "text for an array": (
        lambda p: edit(
            p, lambda t: t["optimizer"]["target"]["encoder"]["encoder_norm"].update(scale="w")
        ),
        r"target.encoder.encoder_norm.scale is str, expected an array",
    ),
    "other driver": (
        lambda p: edit(
            p, lambda t: t["optimizer"]["target"]["token_embedder"]["embedding"].update(driver="n5")
        ),
        r"target.token_embedder.embedding has driver 'n5'",
    ),
    "path that leads out": (
        lambda p: edit(
            p,
            lambda t: t["optimizer"]["target"]["token_embedder"]["embedding"]["kvstore"].update(
                path="../x/"
            ),
        ),
        r"points to '../x/', which is outside the checkpoint",
    ),
    "array of another checkpoint": (
        lambda p: edit(
            p,
            lambda t: t["optimizer"]["target"]["token_embedder"]["embedding"]["metadata"].update(
                shape=[9, 16]
            ),
        ),
        r"array target.token_embedder.embedding is \[48, 16\], .*/checkpoint says \[9, 16\]",
    ),
    "parameter lost": (
        lambda p: edit(
            p, lambda t: t["optimizer"]["target"]["encoder"]["layers_0"].pop("attention") and None
        ),
        r"array target.encoder.layers_0.attention.query.kernel is missing",
    ),
    "norm lost": (
        lambda p: edit(
            p, lambda t: t["optimizer"]["target"]["decoder"].pop("decoder_norm") and None
        ),
        r"array target.decoder.decoder_norm.scale is missing; the checkpoint is incomplete",
    ),
    "layer lost": (
        lambda p: edit(p, lambda t: t["optimizer"]["target"]["encoder"].pop("layers_2") and None),
        r"target.encoder.layers_2 is missing",
    ),
    "superfluous": (
        lambda p: edit(
            p, lambda t: t["optimizer"]["target"].update(adapter={"scale": np.ones(2, np.float32)})
        ),
        r"array target.adapter.scale is none of a Switch Transformer's",
    ),
    "no experts": (
        lambda p: edit(
            p,
            lambda t: (
                [
                    t["optimizer"]["target"][s][f"layers_{i}"].update(
                        mlp=t["optimizer"]["target"][s]["layers_0"]["mlp"]
                    )
                    for s in ("encoder", "decoder")
                    for i in (1, 3)
                ]
                and None
            ),
        ),
        r"no layer has experts .* this is a plain T5",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, checkpoint: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-30]), "truncated"),
        (lambda f: f.write_bytes(b"no gzip at all"), "inflate"),
        (lambda f: f.write_bytes(b""), "Not enough data"),
    ],
)
@pytest.mark.parametrize("name", [WI, Q])
def test_damaged_chunks_are_refused(
    name: str, damage: Callable[[Path], Any], message: str, checkpoint: Path
) -> None:
    """A missing chunk too, which TensorStore would take for zeros."""
    chunk = sorted(p for p in (checkpoint / f"target.{name}").iterdir() if p.name != ".zarray")[0]
    damage(chunk)
    found = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        for _ in found.stream():
            pass
    assert f"array target.{name} cannot be read" in str(caught.value)
    assert "copy the checkpoint again" in str(caught.value)


def test_nothing_is_unpickled_or_run(checkpoint: Path) -> None:
    import msgpack

    for packed in (
        ([1], "O", b"12345678"),
        ([1 << 40], "float32", b"1234"),
        ([-1], "float32", b""),
        ([1], "x", b""),
    ):
        data = msgpack.packb(
            {"version": 3, "optimizer": {"target": msgpack.ExtType(1, msgpack.packb(packed))}}
        )
        (checkpoint / "checkpoint").write_bytes(data)
        with pytest.raises(CheckpointError, match="no msgpack index"):
            open_checkpoint(checkpoint)


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


def test_experts_are_read_in_blocks(
    parameters: dict[str, np.ndarray], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks here hold two experts: a block of two is decoded once, kept until both are out, and
    then dropped."""
    reads: list[tuple[str, int]] = []
    read = tensorstore_array.StoredArray.read

    def counting(self: tensorstore_array.StoredArray, rows: slice | None = None) -> np.ndarray:
        found = read(self, rows)
        reads.append((self.name, found.nbytes))
        return found

    monkeypatch.setattr(tensorstore_array.StoredArray, "read", counting)
    each = parameters[WI][0].nbytes
    monkeypatch.setattr(tensorstore_array, "BLOCK_BYTES", 2 * each)
    monkeypatch.setattr(tensorstore_array, "KEPT_BYTES", 6 * each)
    found = open_checkpoint(checkpoint)
    for name, array in found.stream():
        source: Any = found.tensors[name]
        assert array.flags.writeable
        assert sum(b.data.nbytes for b in source.blocks._blocks.values()) <= 6 * each
    assert [r for r in reads if r[0] == f"target.{WI}"] == [(f"target.{WI}", 2 * each)] * 2
    assert not source.blocks._blocks
    # In any order, and again: what was dropped is read anew.
    names = [n for n in found.tensors if "expert_" in n]
    for name in [*reversed(names), *names]:
        assert found.tensors[name].read().nbytes == found.tensors[name].nbytes
        assert sum(b.data.nbytes for b in source.blocks._blocks.values()) <= 6 * each


def test_writing_holds_one_array(tmp_path: Path) -> None:
    switch.random_switch().save_pretrained(tmp_path / "hf")
    alive: list[weakref.ref[np.ndarray]] = []
    for _, _, array in t5x_names.stream_arrays(open_checkpoint(tmp_path / "hf")):
        assert sum(r() is not None for r in alive) <= 1  # the loop's own, until it takes the next
        alive.append(weakref.ref(array))


@pytest.mark.parametrize(
    ("shape", "limit", "chunk"),
    [
        ((8, 768, 3072), 1 << 24, [8, 768, 1536]),
        ((7, 5), 10, [1, 5]),
        ((13,), 4, [1]),
        ((4, 4), 16, [4, 4]),
        ((), 1, []),
    ],
)
def test_chunks_divide_evenly(shape: tuple[int, ...], limit: int, chunk: list[int]) -> None:
    assert even_chunks(shape, limit) == chunk
