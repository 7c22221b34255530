"""T5X directories that are damaged: what is wrong is named, and nothing in one is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import CheckpointError
from common.checkpoints import (
    open_checkpoint,
)
from tests import switch
from tests.oracle.checkpoints.t5x.same import WI

# Damage


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = switch.load_index(path)
    switch.save_index(path, change(tree) or tree)


def reshape(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write one array anew, in another shape."""
    parameters = switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    shutil.rmtree(path)
    switch.write_t5x(path, parameters | {name: change(parameters[name])})


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
