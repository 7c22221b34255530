"""Checkpoint directories changed as trainers, tools and people change them, and what both sides
make of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, SwitchTransformersForConditionalGeneration

from common import Store, build_store, load_engine
from tests import helpers, switch_models

IDS = [[1, 20, 30, 40, 77, 5]]
ANSWERS = [[0, 9, 33, 71]]


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to))


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of a config.json; `...` takes one out."""
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors"
) -> None:
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, path / file, metadata={"format": "pt"}
    )


def is_switch(path: Path) -> bool:
    return bool(
        json.loads((path / "config.json").read_text())["model_type"] == "switch_transformers"
    )


def theirs(path: Path) -> np.ndarray:
    """Logits of the model that transformers loads from a directory, in float32."""
    if is_switch(path):
        model = SwitchTransformersForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32
        ).eval()
        return switch_models.hf_logits(model, IDS, ANSWERS)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    return helpers.hf_logits(model, IDS)


def ours(path: Path, work: Path) -> tuple[np.ndarray, Store]:
    """Logits of a store of that directory alone, and the store."""
    store = build_store(work / "store", {"t": path}, slots="all")
    with load_engine(store.path, dtype="float32") as engine:
        inputs = (IDS, ANSWERS) if is_switch(path) else (IDS,)
        return engine.logits("t", *inputs), store


def check_same(path: Path, work: Path) -> Store:
    """Both sides serve the same weights in the same way."""
    found, store = ours(path, work)
    helpers.assert_close(found, theirs(path))
    return store
