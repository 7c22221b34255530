"""Which weights a directory means: transformers loads it, and we serve the same or say why not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common import CheckpointError
from common.checkpoints import open_checkpoint
from tests import helpers
from tests.oracle.directories import (
    check_same,
    copied,
    edit_config,
    ours,
    tensors_of,
    theirs,
    write_tensors,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(helpers.random_mixtral(3), tmp_path_factory.mktemp("directories") / "base")


def two_sets(base: Path, path: Path) -> None:
    """An older save in shards, a newer whole file beside it."""
    helpers.save(helpers.random_mixtral(4), path, max_shard_size="20KB")
    shutil.copy(base / "model.safetensors", path)


def index_left(base: Path, path: Path) -> None:
    two_sets(base, path)
    for shard in path.glob("model-*.safetensors"):
        shard.unlink()


def stray_shard(base: Path, path: Path) -> None:
    helpers.save(helpers.random_mixtral(3), path, max_shard_size="20KB")
    other = helpers.save(helpers.random_mixtral(4), path.parent / "other")
    shutil.copy(other / "model.safetensors", path / "model-00099-of-00099.safetensors")


def consolidated(base: Path, path: Path) -> None:
    copied(base, path)
    write_tensors(
        path,
        tensors_of(helpers.save(helpers.random_mixtral(4), path.parent / "other")),
        "consolidated.safetensors",
    )


def pickle_beside(base: Path, path: Path) -> None:
    copied(base, path)
    torch.save({}, path / "pytorch_model.bin")


def variant_beside(base: Path, path: Path) -> None:
    copied(base, path)
    shutil.copy(base / "model.safetensors", path / "model.fp16.safetensors")


def named_by_config(base: Path, path: Path) -> None:
    two_sets(base, path)
    (path / "model.safetensors").rename(path / "newest.safetensors")
    edit_config(path, transformers_weights="newest.safetensors")


def tensor_outside_index(base: Path, path: Path) -> None:
    """What a shard holds and the index does not name is read all the same."""
    helpers.save(helpers.random_mixtral(3), path, max_shard_size="20KB")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "norm" not in k}
    (path / INDEX).write_text(json.dumps(index))


def base_model_names(base: Path, path: Path) -> None:
    copied(base, path)
    write_tensors(path, {k.removeprefix("model."): v for k, v in tensors_of(base).items()})


def buffers(base: Path, path: Path) -> None:
    copied(base, path)
    beside = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4, dtype=torch.int64),
        "model.layers.0.self_attn._extra_state": torch.zeros(3, dtype=torch.uint8),
        "v_head.summary.weight": torch.zeros(1, 32),
    }
    write_tensors(path, tensors_of(base) | beside)


SAME: dict[str, tuple[Callable[[Path, Path], None], str | None]] = {
    "two sets": (two_sets, "read from model.safetensors, .* not read: model-00001-of.* more"),
    "index left": (index_left, rf"read from model.safetensors, .* not read: {INDEX}"),
    "stray shard": (
        stray_shard,
        rf"read from {INDEX}, .* not read: model-00099-of-00099.safetensors",
    ),
    "consolidated": (consolidated, "not read: consolidated.safetensors"),
    "pickle beside": (pickle_beside, "not read: pytorch_model.bin"),
    "variant beside": (variant_beside, "not read: model.fp16.safetensors"),
    "named by config": (named_by_config, "read from newest.safetensors, .*not read: model-00001"),
    "outside the index": (tensor_outside_index, None),
    "names of the base model": (base_model_names, None),
    "buffers": (
        buffers,
        r"3 tensors that the model does not use were left out, first model.layers.0",
    ),
}


def test_an_adapter_beside_a_whole_model_is_not_applied(base: Path, tmp_path: Path) -> None:
    path = copied(base, tmp_path / "it")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    write_tensors(path, {"x.lora_A.weight": torch.zeros(2, 2)}, "adapter_model.safetensors")
    found, store = ours(path, tmp_path)
    helpers.assert_close(found, theirs(base))
    assert "adapter beside the weights (adapter_config.json) is not applied" in str(
        store.tenant("t").notes
    )


@pytest.mark.parametrize("kind", SAME)
def test_the_same_weights_as_transformers(kind: str, base: Path, tmp_path: Path) -> None:
    make, note = SAME[kind]
    make(base, tmp_path / "it")
    store = check_same(tmp_path / "it", tmp_path)
    notes = store.tenant("t").notes
    if note is None:
        assert notes == ()
    else:
        assert any(re.search(note, one) for one in notes), notes


def test_the_older_set_would_be_seen(base: Path, tmp_path: Path) -> None:
    """The two sets that the test above tells apart do differ."""
    two_sets(base, tmp_path / "it")
    (tmp_path / "it" / "model.safetensors").unlink()
    older, _ = ours(tmp_path / "it", tmp_path)
    assert np.abs(older - theirs(base)).max() > 0.1


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def renamed(name: str) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors").rename(path / name) and None


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda path: write_tensors(path, {prefix + k: v for k, v in tensors_of(path).items()})


def compiled_layers(path: Path) -> None:
    write_tensors(
        path,
        {k.replace("layers.0.", "layers.0._orig_mod."): v for k, v in tensors_of(path).items()},
    )


def adapter_left_in(path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    tensors = {
        k.replace(f"{q}.weight", f"{q}.base_layer.weight"): v for k, v in tensors_of(path).items()
    }
    write_tensors(path, tensors | {f"{q}.lora_A.default.weight": torch.zeros(4, 32)})


def without_index(path: Path) -> None:
    without_weights(path)
    helpers.save(helpers.random_mixtral(3), path, max_shard_size="20KB")
    (path / INDEX).unlink()


def trainers_run(path: Path) -> None:
    whole = path.rename(path.with_name("whole"))
    for step in (500, 1000):
        copied(whole, path / f"checkpoint-{step}")
    (path / "trainer_state.json").write_text("{}")


def hub_root(path: Path) -> None:
    whole = path.rename(path.with_name("whole"))
    copied(whole, path / "snapshots" / "abc")


def link_to_nothing(path: Path) -> None:
    without_weights(path)
    (path / "model.safetensors").symlink_to("../../blobs/gone")


def pointer(name: str) -> Callable[[Path], None]:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234\n"
    return lambda path: (path / name).write_text(text) and None


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def float64(path: Path) -> None:
    write_tensors(path, {k: v.double() for k, v in tensors_of(path).items()})


def mixed_shards(path: Path) -> None:
    """A shard of another save under a new one's name: both hold one tensor."""
    without_weights(path)
    helpers.save(helpers.random_mixtral(3), path, max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    index = json.loads((path / INDEX).read_text())
    name = next(k for k, v in index["weight_map"].items() if v == shards[0].name)
    from safetensors.torch import load_file, save_file

    save_file(
        load_file(shards[1]) | {name: load_file(shards[0])[name] + 1},
        shards[1],
        metadata={"format": "pt"},
    )


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "adapter left in": (
        adapter_left_in,
        r"q_proj.base_layer.weight is an adapter's, .*merge_and_unload",
    ),
    "PEFT's prefix": (prefixed("base_model.model."), r"has PEFT's prefix 'base_model.model.'"),
    "DDP's prefix": (prefixed("module."), r"has DistributedDataParallel's .*prefix 'module.'"),
    "torch.compile's prefix": (prefixed("_orig_mod."), r"has torch.compile's prefix '_orig_mod.'"),
    "torch.compile's prefix inside": (
        compiled_layers,
        r"tensor model.layers.0._orig_mod.\S+ has torch.compile's",
    ),
    "variant": (
        renamed("model.fp16.safetensors"),
        r"model.fp16.safetensors is a variant; rename it",
    ),
    "other name": (
        renamed("weights.safetensors"),
        r"weights.safetensors has a name that transformers does not read",
    ),
    "consolidated alone": (renamed("consolidated.00.safetensors"), r"Mistral's own layout"),
    "no index": (
        without_index,
        rf"the shards are here \(model-00001-of-\d+.safetensors, \d+ in all\) but not {INDEX}",
    ),
    "mixed shards": (
        mixed_shards,
        "is also in .* with other values; shards of two saves are mixed",
    ),
    "trainer's run": (trainers_run, r"give one of them: \S+checkpoint-1000, \S+checkpoint-500"),
    "hub's root": (hub_root, r"give one of them: \S+snapshots/abc"),
    "link to nothing": (link_to_nothing, r"model.safetensors is a link to a file that is gone"),
    "pointer": (
        pointer("model.safetensors"),
        r"model.safetensors: is a git-lfs pointer, .*git lfs pull",
    ),
    "pointer for config": (pointer("config.json"), r"config.json: is a git-lfs pointer"),
    "pointer for tokenizer": (pointer("tokenizer.json"), r"tokenizer.json: is a git-lfs pointer"),
    "truncated": (truncated, r"not a whole safetensors file \(\d+ of \d+ bytes are here\)"),
    "float64": (float64, r"is float64 \(F64\); convert it to float32"),
    "a file": (
        lambda p: (shutil.move(p / "config.json", p.parent), shutil.rmtree(p), p.touch()) and None,
        "is a file; give the directory",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_cause_and_mend(kind: str, base: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[kind]
    path = copied(base, tmp_path / "it")
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "quantised" not in str(caught.value)
