"""The GPU suite's code, at tiny shapes on a CPU. No time is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.stores import TINY, several
from benchmarks.material.random_models import write_random
from common import build_store, load_engine


@pytest.mark.slow
def test_gpu_suite_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device=cpu", "--tiny", f"--out={tmp_path}"]) == 0
    (written,) = tmp_path.glob("*-cpu.md")
    text = written.read_text()
    titles = [
        "Tenant switch",
        "What a switch adds",
        "Products of one layer",
        "beside transformers",
        "Misses",
    ]
    titles += ["Decode steps, tiny", "hidden behind the prompt", "QoS of several tenants"]
    for title in titles:
        assert title in text
    assert (
        "| brought meanwhile |" in text
        and "| paper |" in text
        and "saturation rate, moetel / paper: " in text
    )
    assert "| tenant switch |" in text


def test_tenants_have_nothing_but_experts_in_common(tmp_path: Path) -> None:
    """What they had equal would be read once for all of them, and copied by no switch."""
    one = write_random(tmp_path / "one", TINY.config, "bfloat16", same_layers=True)
    built = build_store(tmp_path / "store", {"tenant": one}, policy="round_robin")
    store = several(built, 3, 4)
    mine, theirs = (store.tenant(name).tensors for name in ("tenant1", "tenant3"))
    shapes = store.family.non_expert_shapes(store.config("tenant1"))
    assert all((mine[name] == theirs[name]) == ("norm" in name) for name in shapes)
    assert all(mine[name] == theirs[name] for name in mine if ".experts." in name)
    with load_engine(store, products="plain") as engine:
        logits = [engine.logits(name, [[5, 6, 7]]) for name in engine.tenants]
        assert all(np.abs(logits[0] - other).max() > 1e-3 for other in logits[1:])


def test_gpu_suite_without_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "torch sees no CUDA device here; use --device cpu --tiny" in capsys.readouterr().err
