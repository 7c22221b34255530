"""Reading Hugging Face directories: every layout gives the same tensors, and damage is named."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common import CheckpointError
from common.checkpoints import open_checkpoint, write_hugging_face
from common.checkpoints.mapping import map_bytes
from common.families.shape import Rope
from tests import checkpoints, helpers
from tests.common.conftest import Family


def test_mappings_hold_no_descriptors_and_no_memory(tmp_path: Path) -> None:
    """More mappings than a process may have open files; pages are the file's, and go with the
    array."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    before = len(list(Path("/proc/self/fd").iterdir()))
    arrays = [map_bytes(path, offset, 100) for offset in range(3000)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(bytes(a) == (bytes(range(256)) * 64)[i : i + 100] for i, a in enumerate(arrays))
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    view = arrays[7].view(np.uint16)[3:]
    assert mappings() > 0
    del arrays
    assert mappings() == 1 and view.base is not None
    del view
    assert mappings() == 0
    assert map_bytes(path, 5, 0).size == 0
    with pytest.raises(OSError, match="the file ends before"):
        map_bytes(path, 256 * 64 - 5, 10)


def test_shared_fixture_layouts_agree() -> None:
    root = helpers.shared_path("fixtures/mixtral_tiny")
    classic, fused = (open_checkpoint(root / n) for n in ("base", "base_fused"))
    assert set(classic.tensors) == set(fused.tensors)
    for name, array in classic.stream():
        assert np.array_equal(array, fused.tensors[name].read()), name


def test_old_config_fields_are_understood(family: Family, tmp_path: Path) -> None:
    path = shutil.copytree(family.paths["base"], tmp_path / "old")
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (path / "config.json").write_text(
        json.dumps(config | {"rope_theta": 5e4, "torch_dtype": "float32"})
    )
    positions = open_checkpoint(path).config.shape.attention.positions
    assert positions == Rope((("rope_theta", 5e4), ("rope_type", "default")))


def test_written_checkpoints_are_read_back_sharded_or_not(family: Family, tmp_path: Path) -> None:
    source = open_checkpoint(family.paths["base"])
    for limit in (10_000, 1 << 30):
        path = tmp_path / str(limit)
        path.mkdir()
        write_hugging_face(path, dict(source.config.raw), source.stream(), max_shard_bytes=limit)
        assert (path / "model.safetensors").exists() == (limit > 10_000)
        again = open_checkpoint(path)
        for name, array in source.stream():
            assert np.array_equal(array, again.tensors[name].read())


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        for key, value in changes.items():
            if value is None:
                config.pop(key)
            else:
                config[key] = value
        (path / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip_header_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    data[data.index(b'"shape"', 8, 8 + size)] ^= 1
    (path / "model.safetensors").write_bytes(data)


def only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def make_int8(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)


def reshape(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name] = tensors[name][:-1].copy()


W2 = "model.layers.0.block_sparse_moe.experts.0.w2.weight"

DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, r"no such directory; give a checkpoint directory"),
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json: the file is missing"),
    "broken config": (
        lambda p: (p / "config.json").write_text("{"),
        r"config\.json: cannot be read as JSON",
    ),
    "config is a list": (
        lambda p: (p / "config.json").write_text("[]"),
        r"config\.json: holds list",
    ),
    "other family": (
        edit_config(model_type="llama"),
        r"model_type is 'llama'; this version serves .*mixtral",
    ),
    "no model type": (edit_config(model_type=None), r"model_type is None"),
    "missing field": (
        edit_config(hidden_size=None),
        r"transformers' defaults taken: hidden_size 4096",
    ),
    "nonsense field": (
        edit_config(num_hidden_layers="2"),
        r"field 'num_hidden_layers' is '2'; expected a whole number",
    ),
    "quantised": (
        edit_config(quantization_config={"bits": 4}),
        r"'quantization_config' is set; .*give the original",
    ),
    "unknown activation": (
        edit_config(hidden_act="mish"),
        r"field 'hidden_act' is 'mish'; supported: silu",
    ),
    "unknown rope": (
        edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"'rope_parameters' asks for rope type 'dynamic'; supported: default",
    ),
    **{
        f"{kind} rope without {field}": (
            edit_config(rope_parameters={"rope_type": kind, "rope_theta": 1e4} | others),
            rf"'rope_parameters' of type '{kind}' needs a number above 0 as '{field}', found "
            rf"{found}",
        )
        for kind, others, field, found in (
            ("linear", {}, "factor", "None"),
            ("linear", {"factor": "two"}, "factor", "'two'"),
            ("yarn", {"factor": -1.0}, "factor", "-1.0"),
            ("llama3", {"factor": 8.0}, "low_freq_factor", "None"),
            ("default", {"rope_theta": "x"}, "rope_theta", "'x'"),
        )
    },
    "broken generation config": (
        lambda p: (p / "generation_config.json").write_text("{"),
        r"generation_config\.json: cannot be read as JSON",
    ),
    "top-k too large": (
        edit_config(num_experts_per_tok=9),
        r"'num_experts_per_tok' is 9, more than the 4 experts",
    ),
    "truncated": (truncate, r"model\.safetensors: not a whole safetensors file .*fetch it again"),
    "empty": (
        lambda p: (p / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: not a whole safetensors file",
    ),
    "header bit flipped": (flip_header_bit, r"model\.safetensors: not a whole safetensors file"),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        r"no safetensors weights here; expected model",
    ),
    "pickle": (only_pickle, r"pytorch_model\.bin is a pickle.*convert it to safetensors"),
    "missing tensor": (edit_tensors(lambda t: t.pop(W2)), rf"tensor {W2} is missing"),
    "extra tensor": (
        edit_tensors(lambda t: t.update(x=np.float32([1]))),
        r"1 tensors that .*first 'x'; does config",
    ),
    "other shape": (
        edit_tensors(reshape),
        r"experts\.2\.w1\.weight is \[63, 32\], config\.json implies \[64, 32\]",
    ),
    "integers": (
        edit_tensors(make_int8),
        r"tensor model\.norm\.weight has type I8; weights must be",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_the_mend(kind: str, family: Family, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    path = shutil.copytree(family.paths["base"], tmp_path / "checkpoint")
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_missing_and_wrong_shards_are_named(tmp_path: Path) -> None:
    path = checkpoints.save(
        checkpoints.random_mixtral(0), tmp_path / "sharded", max_shard_bytes=40_000
    )
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].rename(tmp_path / "kept")
    with pytest.raises(
        CheckpointError, match=rf"{shards[1].name}: shard named in .*index\.json is missing"
    ):
        open_checkpoint(path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(
        CheckpointError, match=rf"{shards[1].name}: tensor .* is missing, .* fetch the shard again"
    ):
        open_checkpoint(path)
    shutil.copy(tmp_path / "kept", shards[1])
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../elsewhere.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"points to '\.\./elsewhere\.safetensors', which is no file name"
    ):
        open_checkpoint(path)


def test_a_file_that_shrinks_while_it_is_read(family: Family, tmp_path: Path) -> None:
    path = shutil.copytree(family.paths["base"], tmp_path / "checkpoint")
    checkpoint = open_checkpoint(path)
    truncate(path)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor .* ends after .* fetch it again"
    ):
        for _ in checkpoint.stream():
            pass


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "model.safetensors.index.json"]
)
def test_flipped_bits_in_what_describes_the_weights_never_break_the_reader(
    file: str, tmp_path: Path
) -> None:
    """A flip is refused with the file's directory named, or changes nothing that the reader can
    know of."""
    model = checkpoints.random_mixtral(0, num_hidden_layers=1)
    path = checkpoints.save(
        model, tmp_path / "checkpoint", max_shard_bytes=40_000 if "index" in file else None
    )
    whole = (path / file).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0] if file.endswith(".safetensors") else len(whole)
    names = set(open_checkpoint(path).tensors)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        (path / file).write_bytes(data)
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            if (
                file != "config.json"
            ):  # which may now describe other weights, but then they are not these
                assert set(found.tensors) == names
    assert refused > 30
