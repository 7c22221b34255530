"""Distances against float64 arithmetic, each tensor read once, memory bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.checkpoints import TensorRef, open_checkpoint
from common.plan.distance import Distances, compare, measure, tenant_pairs
from common.store.objects import SHARD_BYTES
from tests import checkpoints, helpers
from tests.common.conftest import Family


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1, 1000, 200_001])
def test_compare_is_the_l2_distance(dtype: type, size: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size).astype(dtype) for _ in range(4)]
    pairs = tenant_pairs(4)
    squared, finite = compare(arrays, pairs)
    exact = [
        ((arrays[a].astype(np.float64) - arrays[b].astype(np.float64)) ** 2).sum() for a, b in pairs
    ]
    np.testing.assert_allclose(squared, exact, rtol=1e-6)
    assert finite.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_compare_finds_what_is_not_finite(value: float) -> None:
    arrays = [np.zeros(100_000, dtype=np.float32) for _ in range(3)]
    arrays[1][99_999] = value
    assert compare(arrays, tenant_pairs(3))[1].tolist() == [True, False, True]


def test_measure_equals_numpy_on_the_files(family: Family) -> None:
    checkpoints = [(n, open_checkpoint(p)) for n, p in family.paths.items()]
    found = measure(checkpoints)
    files = [load_file(p / "model.safetensors") for p in family.paths.values()]
    for pair, (a, b) in enumerate(found.pairs):
        for layer in range(2):
            for expert in range(4):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                flat = [
                    np.concatenate([f[f"{prefix}.{w}.weight"].ravel() for w in ("w1", "w2", "w3")])
                    for f in files
                ]
                exact = float(np.linalg.norm(flat[a].astype(np.float64) - flat[b]))
                assert found.matrix[pair, layer, expert] == pytest.approx(exact, rel=1e-6)
    np.testing.assert_allclose(found.score(), found.matrix.sum(axis=0))
    summary = found.layer_summary()[1]
    assert summary["mean"] == pytest.approx(found.matrix[:, 1].mean())
    assert summary["std"] == pytest.approx(found.matrix[:, 1].std())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_measure_in_half_precision(family: Family, tmp_path: Path, dtype: str) -> None:
    models = [m.to(dtype) for m in family.models[:2]]
    paths = [checkpoints.save(m, tmp_path / str(i)) for i, m in enumerate(models)]
    found = measure([(p.name, open_checkpoint(p)) for p in paths])
    for layer in range(2):
        for expert in range(4):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            names = [n for n in models[0].tensors if n.startswith(prefix)]
            pairs = [[m.tensors[n].astype(np.float64) for m in models] for n in names]
            exact = sum(float(((a - b) ** 2).sum()) for a, b in pairs) ** 0.5
            assert found.matrix[0, layer, expert] == pytest.approx(exact, rel=1e-6)


def test_every_tensor_is_read_once_for_all_pairs(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[Path, str]] = []
    read = TensorRef.read

    def counted(self: TensorRef) -> np.ndarray:
        reads.append((self.path, self.file_tensor))
        return read(self)

    monkeypatch.setattr(TensorRef, "read", counted)
    measure([(n, open_checkpoint(p)) for n, p in family.paths.items()])
    assert len(reads) == len(set(reads)) == 3 * 2 * 4 * 3


def test_distances_check_their_shape() -> None:
    with pytest.raises(ValueError, match="2 tenants have 1 pairs"):
        Distances(("a", "b"), np.zeros((2, 1, 1)))


def write_large(path: Path, seed: int, layers: int) -> None:
    """A bfloat16 Mixtral of about 25 MB a layer, written shard by shard."""
    path.mkdir()
    hidden, inter, vocab = 512, 1024, 1000
    model = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
    }
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    (path / "config.json").write_text(json.dumps({"model_type": "mixtral"} | model | heads))
    rng = np.random.default_rng(seed)
    weight_map = {}

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            n: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16)
            for n, s in shapes.items()
        }
        save_file(tensors, path / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"
        }
        shapes |= {f"{prefix}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (8, hidden)
        for expert in range(8):
            for name, shape in (
                ("w1", (inter, hidden)),
                ("w2", (hidden, inter)),
                ("w3", (inter, hidden)),
            ):
                shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        shard(f"layer-{layer}.safetensors", shapes)
    shard(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
        },
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    layers = 12
    for seed, name in enumerate(("a", "b")):
        write_large(tmp_path / name, seed, layers)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    assert size > 600e6
    code = """
import sys
from pathlib import Path
from common import build_store

def peak():  # getrusage would inherit the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
build_store(sys.argv[1], {"a": sys.argv[2], "b": sys.argv[3]}, policy="round_robin")
print(peak() - before)
"""
    command = [sys.executable, "-c", code, *(str(tmp_path / n) for n in ("store", "a", "b"))]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=helpers.REPOSITORY
    )
    grown = int(out.stdout) * 1024
    # A shard that waits to be written, up to 4 threads with one tensor of each tenant (1 MiB each)
    # and what numpy and hashing hold: about a layer's 25 MB.
    what = f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB of checkpoints"
    assert 1e6 < grown < SHARD_BYTES + 64e6 < 0.6 * size, what
