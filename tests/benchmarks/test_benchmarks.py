"""Every benchmark runs at a tiny shape and writes its tables. No time is judged: machines are
shared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    cpu_products,
    mixtral_cpu,
    reconfiguration,
    residuals,
    similarity,
    store_build,
)
from benchmarks.common import Shape, Spread, ratios
from benchmarks.gpu import __main__ as gpu
from common import build_store, load_engine

TINY = [
    "--hidden-size=64",
    "--intermediate-size=128",
    "--num-hidden-layers=2",
    "--num-attention-heads=4",
]
TINY += ["--num-key-value-heads=2", "--vocab-size=256"]


def outputs(tmp_path: Path) -> list[str]:
    return [f"--json={tmp_path / 'rows.json'}", f"--markdown={tmp_path / 'table.md'}"]


def test_mixtral_cpu(tmp_path: Path) -> None:
    options = [
        "--prefill=16",
        "--batch",
        "1",
        "3",
        "--new-tokens=3",
        "--repeats=2",
        "--bandwidth-bytes=10000000",
    ]
    # A product of the usual size takes minutes where the processor has none of bfloat16.
    rows = mixtral_cpu.main([*TINY, *options, "--product-size=64", *outputs(tmp_path)])
    assert [r["what"] for r in rows] == [
        "prefill 16, ms",
        "decode batch 1, tokens/s",
        "decode batch 3, tokens/s",
    ]
    for row in rows:
        assert row["ours"].low <= row["ours"].median <= row["ours"].high
        assert row["ratio"].median > 0 and float(row["floor"]) > 0
    assert float(rows[1]["experts hit"]) == 2.0
    saved = json.loads((tmp_path / "rows.json").read_text())[0]
    assert len(saved["rows"]) == 3 and set(saved["rows"][0]["ratio"]) == {"median", "low", "high"}
    assert "| decode batch 3, tokens/s |" in (tmp_path / "table.md").read_text()


def test_cpu_products(tmp_path: Path) -> None:
    options = [
        "--shapes",
        "128x64",
        "--experts",
        "64x128",
        "--rows",
        "1",
        "8",
        "--chain-bytes=200000",
        "--repeats=1",
    ]
    rows = cpu_products.main([*options, *outputs(tmp_path)])
    assert [(r["dtype"], r["rows"]) for r in rows] == [
        (d, n) for d in ("bfloat16", "float32") for n in (1, 8)
    ]
    assert all(isinstance(r["plain"], Spread) and r["best"] in r for r in rows)
    whole = json.loads((tmp_path / "rows.json").read_text())[1]["rows"]
    assert len(whole) == 4 and all(r["best"] in cpu_products.FEED_FORWARDS for r in whole)


def test_a_wrong_feed_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = cpu_products.FeedForwards(64, 128, torch.float32, 200_000)
    chain.measure(2, 1)
    right = chain.ways(2)
    assert "plain" in right
    monkeypatch.setattr(
        chain, "ways", lambda rows: right | {"wrong": lambda: [2 * y for y in right["plain"]()]}
    )
    with pytest.raises(AssertionError, match="wrong differs from plain"):
        chain.measure(2, 1)


def test_store_build(tmp_path: Path) -> None:
    (row,) = store_build.main([*TINY, "--repeats=1", *outputs(tmp_path)])
    assert (
        float(row["build, GB/s"]) >= 0 and "memory grown, MB" in (tmp_path / "table.md").read_text()
    )


def test_reconfiguration(tmp_path: Path) -> None:
    every, one = reconfiguration.main(
        [*TINY, "--switches=4", "--prompt=5", "--bandwidth-bytes=10000000", *outputs(tmp_path)]
    )
    assert (every["ready tenants"], one["ready tenants"]) == ("all", 1)
    assert every["bytes copied a switch"] == 0 and one["bytes copied a switch"] > 0
    assert "| all |" in (tmp_path / "table.md").read_text()
    assert len(json.loads((tmp_path / "rows.json").read_text())[0]["rows"]) == 2
    with pytest.raises(SystemExit):
        reconfiguration.main([*TINY, "--tenants=1"])


def test_similarity(tmp_path: Path) -> None:
    options = ["--gigabytes=0.002", "--workers", "1", "--repeats=1"]
    (row,) = similarity.main([*TINY, *options, *outputs(tmp_path)])
    assert row["distances, GB/s"].median > 0 and row["memory grown, MB"].low >= 0
    assert "distances / read" in (tmp_path / "table.md").read_text()


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
    titles += ["several tenants in one batch", "hidden behind the prompt", "QoS of several tenants"]
    for title in titles:
        assert title in text
    assert (
        "| brought meanwhile |" in text
        and "| paper |" in text
        and "saturation rate, moetel / paper: " in text
    )
    assert "| tenant switch |" in text


def test_tenants_of_the_gpu_suite_have_nothing_but_experts_in_common(tmp_path: Path) -> None:
    """What they had equal would be read once for all of them, and copied by no switch."""
    one = gpu.write_tenant(tmp_path / "one", gpu.TINY, 0, same_layers=True)
    store = gpu.several(
        build_store(tmp_path / "store", {"tenant": one}, policy="round_robin"), 3, 4
    )
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


def test_floors_count_the_weights_of_a_step() -> None:
    # The peers' table: 854 MB in bfloat16 at batch 1 for the mini shape.
    assert Shape().step_weights(2) * 2 == pytest.approx(854e6, rel=0.001)
    assert ratios([2.0, 6.0], [1.0, 2.0]) == Spread(2.5, 2.0, 3.0)


SWITCH = [
    "--d-model=32",
    "--d-kv=8",
    "--d-ff=64",
    "--num-heads=4",
    "--num-layers=2",
    "--num-sparse-layers=1",
]
SWITCH += ["--num-experts=4", "--vocab-size=96"]


@pytest.mark.slow
def test_switch_cpu(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from benchmarks import switch_cpu

    options = [
        "--prefill=16",
        "--batch",
        "1",
        "3",
        "--new-tokens=3",
        "--repeats=2",
        "--bandwidth-bytes=10000000",
    ]
    rows = switch_cpu.main([*SWITCH, *options, "--product-size=64", *outputs(tmp_path)])
    assert [r["what"] for r in rows] == [
        "first token, prompt 16, ms",
        "decode batch 1, tokens/s",
        "decode batch 3, tokens/s",
    ]
    assert all(row["ratio"].median > 0 for row in rows)
    notes = json.loads((tmp_path / "rows.json").read_text())[0]["notes"]
    (found,) = (n for n in notes if n.startswith("logits of both sides"))
    assert float(found.split("largest difference ")[1].split(",")[0]) < 1e-4


@pytest.mark.slow
def test_switch_dispatch(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from benchmarks import switch_dispatch

    options = [
        "--d-model=16",
        "--d-ff=64",
        "--slots=4",
        "--tokens",
        "1",
        "6",
        "--repeats=1",
        "--layers=2",
    ]
    rows = switch_dispatch.main([*options, "--bandwidth-bytes=1000000", *outputs(tmp_path)])
    assert {r["tokens"] for r in rows} == {1, 6}
    assert {"ragged_dot", "dense: every expert, then select"} <= {r["way"] for r in rows}


@pytest.mark.slow
def test_switch_tenants(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from benchmarks import switch_tenants

    options = [
        "--dtypes",
        "bfloat16",
        "--variants=1",
        "--prompt=5",
        "--rounds=4",
        f"--scratch={tmp_path}",
    ]
    rows = {
        r["what"]: r["value"] for r in switch_tenants.main([*SWITCH, *options, *outputs(tmp_path)])
    }
    assert rows["compilations during the switches"] == 0
    assert rows["tenants, positions, resident copies"] == "2, 8, 8"


@pytest.mark.slow
def test_demo_scores(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from benchmarks import demo_scores

    rows = demo_scores.main(["--numbers=12", "--family=switch", *outputs(tmp_path)])
    assert len(rows) == 12
    assert all(r["float32"] == "100.0%" for r in rows if r["sharing"] == "alone")
    assert all(float(r["kept"].rstrip("%")) >= 80 for r in rows)


def test_residuals(tmp_path: Path) -> None:
    options = ["--tenants=2", "--batch", "1", "3", "--prompts=9", "--steps=2", "--repeats=2"]
    rows = residuals.main([*TINY, *options, "--bandwidth-bytes=10000000", *outputs(tmp_path)])
    assert [(r["what"], r["tenants"]) for r in rows[::3]] == [
        ("layer, 1 rows", 1),
        ("layer, 3 rows", 1),
        ("layer, 3 rows", 2),
        ("layer, 9 rows", 1),
        ("step, batch 1", 1),
        ("step, batch 3", 1),
        ("step, batch 3", 2),
        ("prompt, 9 tokens", 1),
    ]
    assert all(row["with / without"].median > 0 for row in rows)
    # More is read with residuals, and most of all with both kinds.
    floors = {r["residuals"]: float(r["floor with, ms"]) for r in rows[:3]}
    assert (
        float(rows[0]["floor without, ms"]) < floors["low rank"] < floors["both"]
        and floors["sign"] < floors["both"]
    )
    assert "| prompt, 9 tokens |" in (tmp_path / "table.md").read_text()
