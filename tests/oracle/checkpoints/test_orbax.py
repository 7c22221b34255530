"""Orbax checkpoints: what the library writes we read, what we write the library restores, damage is
named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from common import CheckpointError
from common.checkpoints import open_checkpoint, write_orbax
from common.families.shape import RelativePositions
from common.families.switch_transformers import shape_of
from tests import switch
from tests.helpers import fingerprint, rest_slow, shared_path
from tests.oracle.checkpoints.t5x.same import assert_same

HANDLERS: dict[str, dict[str, bool]] = {
    "ocdbt": {"use_ocdbt": True},
    "plain": {"use_ocdbt": False},
    "ocdbt zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "plain zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


def save(path: Path, tree: Any, **options: bool) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path.resolve(), tree)
    return path


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield ".".join(k.key for k in keys), leaf


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    return {
        n: np.ascontiguousarray(a)
        for n, a in switch.t5x_parameters(switch.arrays_of(switch.random_switch())).items()
    }


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    switch.random_switch().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(parameters: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a T5X run saves through Orbax: parameters, step and some optimizer state; without
    OCDBT."""
    state = {
        "step": np.int32(3),
        "param_states": {"decoder": {"decoder_norm": {"scale": {"v": np.ones(16)}}}},
    }
    tree = {"target": switch.nested(parameters), "state": state}
    return save(tmp_path_factory.mktemp("saved") / "item", tree, use_ocdbt=False)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("arrays", ["jax", "numpy"])
def test_what_orbax_writes(
    handler: str, arrays: str, parameters: dict[str, np.ndarray], hf: Path, tmp_path: Path
) -> None:
    tree: Any = {"target": switch.nested(parameters), "state": {"step": np.int32(3)}, "empty": {}}
    if arrays == "jax":
        tree = jax.tree.map(jax.numpy.asarray, tree)
    found = open_checkpoint(save(tmp_path / "item", tree, **HANDLERS[handler]))
    assert_same(found, open_checkpoint(hf))
    assert "relative_attention_max_distance 128" in found.notes[0]
    assert open_checkpoint(tmp_path / "item", hf).config == open_checkpoint(hf).config


@pytest.mark.parametrize("variant", ["untied", "router bias", "uneven depths"])
def test_variants(variant: str, tmp_path: Path) -> None:
    model = switch.random_switch(**switch.VARIANTS[variant])
    model.save_pretrained(tmp_path / "hf")
    tree = {"target": switch.nested(switch.t5x_parameters(switch.arrays_of(model)))}
    found = open_checkpoint(save(tmp_path / "item", jax.tree.map(np.ascontiguousarray, tree)))
    assert_same(found, open_checkpoint(tmp_path / "hf"))


@pytest.mark.parametrize("place", [("params",), ("params", "params"), ()])
def test_places_of_the_parameters(
    place: tuple[str, ...], parameters: dict[str, np.ndarray], hf: Path, tmp_path: Path
) -> None:
    tree: Any = switch.nested(parameters)
    for key in reversed(place):
        tree = {key: tree}
    if place:
        tree["step"] = np.int32(1)
    assert_same(open_checkpoint(save(tmp_path / "item", tree)), open_checkpoint(hf))


def test_bfloat16(parameters: dict[str, np.ndarray], hf: Path, tmp_path: Path) -> None:
    tree = {
        "target": switch.nested({n: a.astype(ml_dtypes.bfloat16) for n, a in parameters.items()})
    }
    found = open_checkpoint(save(tmp_path / "item", tree))
    for name, array in open_checkpoint(hf).stream():
        assert np.array_equal(found.tensors[name].read(), array.astype(ml_dtypes.bfloat16)), name


@pytest.mark.parametrize("named", [False, True])
def test_managers_and_runs(
    named: bool, parameters: dict[str, np.ndarray], hf: Path, tmp_path: Path
) -> None:
    """A manager's directory with one step, its step, and its item; two steps are refused with their
    names."""
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint" if named else None)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        tree = ocp.args.StandardSave({"target": switch.nested(parameters)})
        for step in (3, 20):
            args = (
                ocp.args.Composite(state=tree, extra=ocp.args.JsonSave({"a": 1})) if named else tree
            )
            manager.save(step, args=args)
            manager.wait_until_finished()
            if step == 3:
                folder = "checkpoint_3" if named else "3"
                for path in (
                    tmp_path,
                    tmp_path / folder,
                    tmp_path / folder / ("state" if named else "default"),
                ):
                    assert_same(open_checkpoint(path), open_checkpoint(hf))
    item = "checkpoint_3/state, checkpoint_20/state" if named else "3/default, 20/default"
    with pytest.raises(CheckpointError, match=f"holds 2 checkpoints; give one of them: {item}"):
        open_checkpoint(tmp_path)
    unfinished = (tmp_path / item.split(", ")[0]).rename(tmp_path / "state.orbax-checkpoint-tmp-17")
    with pytest.raises(CheckpointError, match="was not finished"):
        open_checkpoint(unfinished)


def old_index(path: Path, prefix: str = "PLACEHOLDER://") -> None:
    """Turn a plain item into one of Orbax before 0.5, as T5X's Orbax backend of 2023 left them."""
    names = [p.name for p in path.iterdir() if (p / ".zarray").is_file()]
    tree = switch.nested({n: f"{prefix}{n}" for n in names})
    tree["state"]["step"] = np.int32(3)
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding"):
        (path / name).unlink(missing_ok=True)
    switch.save_index(path, tree)


@pytest.mark.parametrize("prefix", ["PLACEHOLDER://", "AGGREGATED://"])
def test_t5x_runs_with_an_old_orbax(prefix: str, saved: Path, hf: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoint_3" / "state")
    old_index(tmp_path / "checkpoint_3" / "state", prefix)
    (tmp_path / "checkpoint_3" / "dataset").mkdir()
    (tmp_path / "checkpoint_3" / "dataset" / "train_ds-000-of-001.index").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "checkpoint_3", tmp_path / "checkpoint_3" / "state"):
        assert_same(open_checkpoint(path), open_checkpoint(hf))


def test_small_arrays_in_the_old_index(
    saved: Path, parameters: dict[str, np.ndarray], hf: Path, tmp_path: Path
) -> None:
    """Aggregated leaves: in the msgpack file, beside `_METADATA` or without it."""
    path = shutil.copytree(saved, tmp_path / "item")
    shutil.rmtree(path / "target.encoder.encoder_norm.scale")
    switch.save_index(
        path,
        {
            "target": switch.nested(
                {"encoder.encoder_norm.scale": parameters["encoder.encoder_norm.scale"]}
            )
        },
    )
    assert_same(open_checkpoint(path), open_checkpoint(hf))


# Writing


@pytest.mark.parametrize("variant", rest_slow(switch.VARIANTS, 2))
def test_orbax_restores_what_we_write(variant: str, tmp_path: Path) -> None:
    model = switch.random_switch(2, **switch.VARIANTS[variant])
    model.save_pretrained(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    path = tmp_path / "orbax"
    path.mkdir()
    steps: list[int] = []
    write_orbax(path, source, step=7, on_tensor=lambda: steps.append(1))
    assert len(steps) == len(source.tensors)
    expected = switch.t5x_parameters(switch.arrays_of(model))
    with ocp.StandardCheckpointer() as standard, ocp.PyTreeCheckpointer() as tree:
        plain = standard.restore(path)
        assert plain["state"]["step"] == 7
        found = dict(leaves(plain["target"]))
        assert set(found) == set(expected)
        assert all(
            found[n].dtype == a.dtype and np.array_equal(found[n], a) for n, a in expected.items()
        )
        # Into what a training program has: shapes, types and devices.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), plain
        )
        restored = standard.restore(path, wanted)
        assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(restored))
        for other in (restored, tree.restore(path)):
            assert jax.tree.all(jax.tree.map(np.array_equal, other, plain))
    assert_same(open_checkpoint(path), source)


def test_written_types_and_chunks(hf: Path, tmp_path: Path) -> None:
    write_orbax(tmp_path, open_checkpoint(hf), dtype="bfloat16")
    (tmp_path / "config.json").write_text((hf / "config.json").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        assert (
            checkpointer.restore(tmp_path)["target"]["token_embedder"]["embedding"].dtype
            == ml_dtypes.bfloat16
        )
    array = json.loads(
        (tmp_path / "target.encoder.layers_1.mlp.expert.wi.kernel" / ".zarray").read_text()
    )
    assert array["chunks"] == [1, 16, 24]  # an expert can be read alone
    found = open_checkpoint(tmp_path)
    assert found.dtype == "bfloat16" and found.notes == ()
    assert shape_of(found.config).attention.positions == RelativePositions(8, 20)


def test_gated(tmp_path: Path) -> None:
    source = open_checkpoint(switch.gated_directory(tmp_path / "hf"))
    (tmp_path / "orbax").mkdir()
    write_orbax(tmp_path / "orbax", source)
    found = open_checkpoint(tmp_path / "orbax")
    assert_same(found, source)
    assert shape_of(found.config).experts.gated


def test_writing_is_repeatable(hf: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_orbax(tmp_path / name, open_checkpoint(hf))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_fixture_through_orbax(tmp_path: Path) -> None:
    source = open_checkpoint(shared_path("fixtures/switch_tiny/t5x/checkpoint_1000"))
    write_orbax(tmp_path, source)
    assert_same(open_checkpoint(tmp_path), open_checkpoint(shared_path("fixtures/switch_tiny/hf")))


# Damage

WI = "encoder.layers_1.mlp.expert.wi.kernel"
EMBEDDING = "('target', 'token_embedder', 'embedding')"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    metadata = json.loads((path / "_METADATA").read_text())
    change(metadata)
    (path / "_METADATA").write_text(json.dumps(metadata))


def keep(path: Path, top: str) -> None:
    """Only the entries of the tree below one key."""
    edit(
        path,
        lambda m: m.update(
            tree_metadata={k: v for k, v in m["tree_metadata"].items() if k.startswith(top)}
        ),
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda p: (p / "_METADATA").unlink(), r"no checkpoint recognised here"),
    "no JSON": (lambda p: (p / "_METADATA").write_text("{"), r"_METADATA: cannot be read as JSON"),
    "no tree": (
        lambda p: edit(p, lambda m: m.pop("tree_metadata")),
        r"field 'tree_metadata' is missing",
    ),
    "entry without keys": (
        lambda p: edit(p, lambda m: m["tree_metadata"].update(bad={"value_metadata": {}})),
        r"_METADATA: entry bad lacks its key",
    ),
    "optimizer alone": (
        lambda p: keep(p, "('state'"),
        r"found state at the top of the tree, no 'target'",
    ),
    "no leaf": (lambda p: keep(p, "nothing"), r"found nothing at the top of the tree"),
    "array missing": (
        lambda p: shutil.rmtree(p / f"target.{WI}"),
        rf"target.{WI}: array target.{WI} cannot be opened \(NOT_FOUND",
    ),
    "parameter lost": (
        lambda p: edit(
            p, lambda m: m["tree_metadata"].pop("('target', 'decoder', 'decoder_norm', 'scale')")
        ),
        r"array target.decoder.decoder_norm.scale is missing",
    ),
    "embedding lost": (
        lambda p: edit(p, lambda m: m["tree_metadata"].pop(EMBEDDING)),
        r"array target.token_embedder.embedding is missing",
    ),
    "name that leads out": (
        lambda p: edit(
            p, lambda m: m["tree_metadata"][EMBEDDING]["key_metadata"][2].update(key="../x")
        ),
        r"array name 'target.token_embedder.../x' is no plain name",
    ),
    "damaged old index": (
        lambda p: [(p / "_METADATA").unlink(), (p / "checkpoint").write_bytes(b"\xc1")],
        r"checkpoint: no msgpack index",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, saved: Path, tmp_path: Path) -> None:
    path = shutil.copytree(saved, tmp_path / "item")
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_database_without_metadata(parameters: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = save(tmp_path / "item", {"target": switch.nested(parameters)})
    (path / "_METADATA").unlink()
    with pytest.raises(
        CheckpointError, match=r"an Orbax checkpoint without _METADATA; it is incomplete"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("lose", [True, False])
def test_lost_and_damaged_chunks(
    handler: str, lose: bool, parameters: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Data files of OCDBT, chunks of zarr: gone, or cut short."""
    path = save(tmp_path / "item", {"target": switch.nested(parameters)}, **HANDLERS[handler])
    if HANDLERS[handler]["use_ocdbt"]:
        victims = [p for p in path.rglob("d/*") if p.is_file()]
    else:
        victims = [
            p
            for p in (path / f"target.{WI}").rglob("*")
            if p.is_file() and p.name not in (".zarray", "zarr.json")
        ]
    assert victims
    for victim in victims:
        if lose:
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(
        CheckpointError, match=r"array target\.\S+ cannot be (read|opened)"
    ) as caught:
        for _ in open_checkpoint(path).stream():
            pass
    assert "copy" in str(caught.value)
