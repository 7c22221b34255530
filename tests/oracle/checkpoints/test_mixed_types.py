"""Checkpoints of more than one type: the store's holds them all, and what it serves is
transformers' in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import build_store
from tests import helpers
from tests.oracle.directories import check_same, copied, tensors_of, write_tensors

W2 = "model.layers.1.block_sparse_moe.experts.1.w2.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(helpers.random_mixtral(3), tmp_path_factory.mktemp("types") / "base")


def half(name: str) -> torch.dtype:
    return torch.float16 if ".experts.0." in name else torch.float32


TYPES: dict[str, tuple[Callable[[str], torch.dtype], str]] = {
    "float32 router and norms": (
        lambda n: torch.float32 if "norm" in n or ".gate." in n else torch.bfloat16,
        "float32",
    ),
    "float32 head": (lambda n: torch.float32 if "lm_head" in n else torch.bfloat16, "float32"),
    "first expert in half": (half, "float32"),
    "bfloat16 and float16": (
        lambda n: torch.float16 if ".experts.0." in n else torch.bfloat16,
        "float32",
    ),
    "bfloat16": (lambda n: torch.bfloat16, "bfloat16"),
    "float16": (lambda n: torch.float16, "float16"),
}


@pytest.mark.parametrize("kind", TYPES)
def test_nothing_is_rounded_unasked(kind: str, base: Path, tmp_path: Path) -> None:
    type_of, expected = TYPES[kind]
    path = copied(base, tmp_path / "it")
    tensors = {n: v.to(type_of(n)) for n, v in tensors_of(base).items()}
    if kind == "first expert in half":
        tensors[W2][0, 0] = 1e5  # beyond float16, the type of the expert that is read first
    write_tensors(path, tensors)
    store = check_same(path, tmp_path)
    assert store.dtype == expected
    said = [
        note for note in store.tenant("t").notes if "--dtype bfloat16 takes half the memory" in note
    ]
    assert len(said) == (len({v.dtype for v in tensors.values()}) > 1)


def test_tenants_of_two_types(base: Path, tmp_path: Path) -> None:
    path = copied(base, tmp_path / "it")
    write_tensors(path, {n: v.bfloat16() for n, v in tensors_of(base).items()})
    store = build_store(tmp_path / "store", {"a": base, "b": path})
    assert store.dtype == "float32"
    assert any(
        "holds bfloat16 and float32 without rounding" in note for note in store.tenant("b").notes
    )
    asked = build_store(tmp_path / "asked", {"a": base, "b": path}, dtype="bfloat16")
    assert asked.dtype == "bfloat16"
    assert any(
        "converted from float32 to bfloat16 (rounded)" in note for note in asked.tenant("a").notes
    )
