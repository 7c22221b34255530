"""As many tensors as four fine-tunes of Qwen3-30B-A3B have, each of them tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from common import SamplingParams, Store, build_store, load_engine
from common.families import FAMILIES
from tests import helpers

pytestmark = pytest.mark.slow

MOST = 5000
"""Files and mappings; there are 73,728 matrices of experts."""

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}


def write(path: Path, seed: int) -> Path:
    """A checkpoint of random weights."""
    path.mkdir()
    family = FAMILIES["qwen3_moe"]
    shapes = family.all_shapes(family.parse_config(CONFIG, "test"))
    rng = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_many_tensors_take_few_files_and_mappings(tmp_path: Path) -> None:
    paths = {f"t{i}": write(tmp_path / f"t{i}", i) for i in range(4)}
    built = build_store(tmp_path / "store", paths, policy="round_robin", slots=5000)
    store = Store.open(built.path)
    assert store.plan == built.plan and store.plan.num_misses > 4000
    assert len(store.manifest.objects) > 73_728
    assert sum(p.is_file() for p in store.path.rglob("*")) < MOST
    rows = helpers.prompts(0, [9], CONFIG["vocab_size"])
    with load_engine(store, device="cpu") as engine:
        found = {name: engine.logits(name, rows) for name in ("t0", "t3")}
        answers = engine.generate_batch(
            [(name, rows[0]) for name in store.tenants],
            SamplingParams(max_new_tokens=3, ignore_eos=True),
        )
        assert all(len(a.token_ids) == 3 for a in answers)
        assert engine.stats()["misses"] > 100
        maps = Path("/proc/self/maps").read_text()
        assert 0 < maps.count(str(store.path)) < MOST
    models = [helpers.load(path) for path in paths.values()]
    for index in (0, 3):
        oracle = helpers.oracle(models, index, store.plan)
        helpers.assert_close(found[f"t{index}"], helpers.hf_logits(oracle, rows))
