"""Adapters made with PEFT itself, and what PEFT makes of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

# Of the extra `dev`; CI has it.
peft = pytest.importorskip("peft")


def adapter(model: Any, config: Any, path: Path, size: float = 0.1) -> Any:
    """A PeftModel of a copy of `model` whose adapter is random and not zero, saved at `path`."""
    found = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in found.named_parameters():
            if "lora_" in name or "modules_to_save" in name or value.requires_grad:
                noise = torch.randn(value.shape, generator=generator) * size
                value.copy_(value + noise if "modules_to_save" in name else noise)
    found.save_pretrained(path)
    return found


def merged(found: Any) -> Any:
    """PEFT's own merge."""
    return copy.deepcopy(found).merge_and_unload()


def modules_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules named as a checkpoint's tensors: matrices are `nn.Linear`, as in transformers 4."""
    root = nn.Module()
    for name, value in tensors.items():
        *way, leaf = name.split(".")
        here: nn.Module = root
        for i, part in enumerate(way):
            if not hasattr(here, part):
                last = i == len(way) - 1 and leaf == "weight" and value.ndim == 2
                made = nn.Linear(*value.shape[::-1], bias=False) if last else nn.Module()
                here.add_module(part, made)
            here = getattr(here, part)
        setattr(here, leaf, nn.Parameter(value.clone()))
    return root


def older(base: Path, config: Any, path: Path, to: Path) -> Path:
    """An adapter of modules with the names that a base has on disk, those of transformers 4, saved
    at `path`; what PEFT merges it to is saved at `to`, beside the base's config."""
    tensors = load_file(base / "model.safetensors")
    found = adapter(modules_of(tensors), config, path)
    whole = {n: v.contiguous() for n, v in merged(found).state_dict().items()}
    to.mkdir()
    (to / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(whole, to / "model.safetensors", metadata={"format": "pt"})
    return path
