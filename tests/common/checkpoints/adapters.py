"""Random adapters of `tests.checkpoints` models, written with numpy and safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model.model.layers."
Q = f"{PREFIX}0.self_attn.q_proj"
W1 = f"{PREFIX}1.block_sparse_moe.experts.2.w1"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "w1"],
    "task_type": "CAUSAL_LM",
}


def tensors() -> dict[str, np.ndarray]:
    """Of a query projection [32, 32] and an expert's gate [64, 32], rank 4."""
    rng = np.random.default_rng(3)
    shapes = {
        f"{Q}.lora_A.weight": (4, 32),
        f"{Q}.lora_B.weight": (32, 4),
        f"{W1}.lora_A.weight": (4, 32),
        f"{W1}.lora_B.weight": (64, 4),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, found: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """An adapter's directory; `...` takes a field out of its config."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {k: v for k, v in (CONFIG | config).items() if v is not ...}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors() if found is None else found, path / "adapter_model.safetensors")
    return path
