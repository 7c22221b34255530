"""Tables that config.json ties and a file holds several of: what differs is served as it is, as
transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from common import CheckpointError
from common.checkpoints import open_checkpoint, safetensors_file, write_t5x
from tests import helpers, switch_models
from tests.oracle.directories import check_same, copied, tensors_of, theirs, write_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SWITCH = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)


def other(table: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)).to(table.dtype)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = helpers.random_mixtral(3, tie_word_embeddings=True)
    return helpers.save(model, tmp_path_factory.mktemp("tied") / "mixtral")


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(switch_models.random_switch(3), tmp_path_factory.mktemp("tied") / "switch")


@pytest.mark.parametrize(
    "kind", ["equal", "equal in another type", "one weight differs", "head alone", "differs"]
)
def test_a_mixtrals_head(kind: str, mixtral: Path, tmp_path: Path) -> None:
    path = copied(mixtral, tmp_path / "it")
    tensors = tensors_of(path)
    table = tensors[EMBEDDING]
    if kind == "equal":
        tensors[HEAD] = table.clone()
    elif kind == "equal in another type":
        tensors[EMBEDDING] = table.bfloat16()
        tensors[HEAD] = tensors[EMBEDDING].float()
    elif kind == "one weight differs":
        tensors[HEAD] = table.clone()
        tensors[HEAD][-1, -1] += 0.5
    elif kind == "head alone":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    else:
        tensors[HEAD] = other(table, 1)
    write_tensors(path, tensors)
    store = check_same(path, tmp_path)
    differs = "differs" in kind
    assert bool(store.family.tied_tables(store.config("t"))) == (not differs)
    ids = store.tenant("t").tensors
    assert (ids[EMBEDDING] != ids[HEAD]) == differs
    assert (
        any("lm_head.weight is served as it is" in note for note in store.tenant("t").notes)
        == differs
    )
    store.export("t", tmp_path / "export")
    helpers.assert_close(theirs(tmp_path / "export"), theirs(path))


def test_tables_are_compared_in_pieces(mixtral: Path, tmp_path: Path) -> None:
    """A difference in any piece is found, and none where there is none."""
    path = copied(mixtral, tmp_path / "it")
    tensors = tensors_of(path)
    a = tensors[EMBEDDING]
    b = a.clone()
    b[-1, 0] += 1
    write_tensors(path, {"a": a, "b": b, "c": a.clone()})
    refs = safetensors_file.read_header(path / "model.safetensors")
    pieces = list(refs["a"].chunks(1000))
    assert len(pieces) > 5 and max(p.nbytes for p in pieces) <= 1000
    assert sum(p.size for p in pieces) == a.numel()
    assert not safetensors_file.same_values(refs["a"], refs["b"])
    assert safetensors_file.same_values(refs["a"], refs["c"])


@pytest.mark.parametrize(
    ("kept", "moved"),
    [
        (SWITCH, ()),
        (SWITCH, SWITCH[3:]),
        (SWITCH[1:], ()),
        (SWITCH[1:], SWITCH[2:3]),
        (SWITCH, SWITCH[1:]),
    ],
    ids=["all equal", "head", "no shared, equal", "no shared, decoder differs", "all differ"],
)
def test_a_switchs_tables(
    kept: Sequence[str], moved: Sequence[str], switch: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jax")
    path = copied(switch, tmp_path / "it")
    tensors = tensors_of(path)
    table = tensors.pop("shared.weight")
    tensors |= {
        n: other(table, i) if n in moved else table.clone()
        for i, n in enumerate(SWITCH)
        if n in kept
    }
    write_tensors(path, tensors)
    store = check_same(path, tmp_path)
    notes = [note for note in store.tenant("t").notes if "served as it is" in note]
    assert [note.split()[0] for note in notes] == list(moved)
    assert {n for n in SWITCH if n in store.tenant("t").tensors} == {"shared.weight", *moved}
    if moved:
        store.export("t", tmp_path / "export")
        helpers.assert_close(theirs(tmp_path / "export"), theirs(path))
        (tmp_path / "t5x").mkdir()
        with pytest.raises(
            CheckpointError, match=r"differ from the shared table .* T5X has no layout"
        ):
            write_t5x(tmp_path / "t5x", open_checkpoint(path))
