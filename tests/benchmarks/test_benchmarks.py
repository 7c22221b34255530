"""Benchmarks run at tiny shapes, for each family, and write their tables. No time is judged:
machines are shared."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import (
    decode,
    mixed_tenants,
    planning,
    prefix_cache,
    reconfiguration,
    residuals,
    store_build,
)
from benchmarks.common import Spread, ratios
from benchmarks.material.random_models import MODELS
from benchmarks.material.shape import Shape

MIXTRAL = ["--sizes", *"hidden_size=64 intermediate_size=128 num_hidden_layers=2".split()]
MIXTRAL += "num_attention_heads=4 num_key_value_heads=2 vocab_size=256".split()
SWITCH = ["--family=switch", "--sizes", *"d_model=32 d_kv=8 d_ff=64 num_heads=4".split()]
SWITCH += "num_layers=2 num_decoder_layers=2 num_sparse_encoder_layers=1".split()
SWITCH += "num_sparse_decoder_layers=1 num_experts=4 vocab_size=96".split()
NEEDS_JAX = pytest.mark.skipif(find_spec("jax") is None, reason="Switch runs on JAX")
FAMILIES = pytest.mark.parametrize(
    "family",
    [
        pytest.param(MIXTRAL, id="mixtral"),
        pytest.param(SWITCH, id="switch", marks=[pytest.mark.slow, NEEDS_JAX]),
    ],
)
# A product of the usual size takes minutes where the processor has none of bfloat16.
SMALL = ["--bandwidth-bytes=10000000", "--product-size=64"]


def outputs(tmp_path: Path) -> list[str]:
    return [f"--json={tmp_path / 'rows.json'}", f"--markdown={tmp_path / 'table.md'}"]


@FAMILIES
def test_decode(family: list[str], tmp_path: Path) -> None:
    options = ["--prefill=16", "--batch", "1", "3", "--new-tokens=3", "--repeats=2", *SMALL]
    rows = decode.main([*family, "--dtype=float32", *options, *outputs(tmp_path)])
    assert [r["what"] for r in rows] == [
        "first token, prompt 16, ms",
        "decode batch 1, tokens/s",
        "decode batch 3, tokens/s",
    ]
    for row in rows:
        assert row["ours"].low <= row["ours"].median <= row["ours"].high
        assert row["ratio"].median > 0 and float(row["floor"]) > 0
    assert float(rows[1]["experts hit"]) == (2.0 if family is MIXTRAL else 1.0)
    saved = json.loads((tmp_path / "rows.json").read_text())[0]
    assert len(saved["rows"]) == 3 and set(saved["rows"][0]["ratio"]) == {"median", "low", "high"}
    (found,) = (n for n in saved["notes"] if n.startswith("logits of both sides"))
    assert float(found.split("largest difference ")[1].split(",")[0]) < 1e-4
    assert "| decode batch 3, tokens/s |" in (tmp_path / "table.md").read_text()


@FAMILIES
def test_mixed_tenants(family: list[str], tmp_path: Path) -> None:
    options = ["--batch", "4", "8", "--steps=3", "--repeats=2", "--prompt=5", *SMALL]
    rows = mixed_tenants.main([*family, *options, *outputs(tmp_path)])
    assert [(r["batch"], r["tenants"]) for r in rows] == [(4, 1), (4, 4), (8, 1), (8, 4)]
    for one, four in zip(rows[::2], rows[1::2], strict=True):
        assert one["of one tenant's rate"].median == 1.0 and four["of one tenant's rate"].median > 0
        assert 1 <= float(one["experts hit"]) <= 8
        assert one["floor of one tenant / floor"] == "1.000"
        assert float(four["floor of one tenant / floor"]) < 1
    assert "| 8 | 4 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        mixed_tenants.main(["--batch", "6"])


def test_what_tenants_have_equal_is_read_once(tmp_path: Path) -> None:
    options = ["--steps=2", "--repeats=1", "--prompt=5", "--batch=8", *SMALL]
    equal = ["--equal", "lm_head", "self_attn"]
    unlike, alike = (
        mixed_tenants.main([*MIXTRAL, *options, *more, *outputs(tmp_path)])[1]
        for more in ([], equal)
    )
    ratio = "floor of one tenant / floor"
    assert float(alike[ratio]) > float(unlike[ratio])
    (saved,) = json.loads((tmp_path / "rows.json").read_text())
    note = next(n for n in saved["notes"] if "equal" in n)
    assert note.startswith("equal: lm_head, self_attn; ")


@FAMILIES
def test_residuals(family: list[str], tmp_path: Path) -> None:
    options = ["--batch", "1", "3", "--prefill=9", "--prompt=5", "--new-tokens=2", "--repeats=1"]
    rows = residuals.main([*family, *options, *SMALL, *outputs(tmp_path)])
    what = ["decode step, batch 1, ms", "decode step, batch 3, ms", "first token, prompt 9, ms"]
    assert [r["what"] for r in rows[::4]] == what
    assert [r["residuals"] for r in rows] == list(residuals.CASES) * 3
    share = {r["residuals"]: float(r["bytes beside a copy"].rstrip("%")) for r in rows[:4]}
    assert share["none"] == 0
    assert share["both"] == pytest.approx(share["sign"] + share["low-rank"], abs=0.2)
    # More is read with residuals, and most of all with both kinds.
    floor = {r["residuals"]: float(r["floor, ms"]) for r in rows[:4]}
    assert floor["none"] <= floor["low-rank"] <= floor["both"] and floor["sign"] <= floor["both"]
    assert all(r["of none's time"].median == 1 for r in rows[::4])
    assert "| first token, prompt 9, ms | both |" in (tmp_path / "table.md").read_text()


@FAMILIES
def test_reconfiguration(family: list[str], tmp_path: Path) -> None:
    options = ["--switches=4", "--prompt=5", *SMALL]
    every, one = reconfiguration.main([*family, *options, *outputs(tmp_path)])
    assert (every["ready tenants"], one["ready tenants"]) == ("all", 1)
    assert every["bytes copied a switch"] == 0 and one["bytes copied a switch"] > 0
    assert "| all |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        reconfiguration.main([*family, "--tenants=1"])


@FAMILIES
def test_store_build(family: list[str], tmp_path: Path) -> None:
    (row,) = store_build.main([*family, "--repeats=1", *outputs(tmp_path)])
    assert float(row["build, GB/s"]) >= 0
    assert "memory grown, MB" in (tmp_path / "table.md").read_text()


def test_planning(tmp_path: Path) -> None:
    sizes = "--sizes hidden_size=32 intermediate_size=48 num_attention_heads=4"
    given = f"{sizes} num_key_value_heads=2 --tenants 2 --samples=12 --positions=10".split()
    rows = planning.main([*given, f"--json={tmp_path / 'rows.json'}"])
    steps = [row["step"] for row in rows]
    assert steps[0] == f"{planning.RIDGE}, once" and steps[-2:] == ["all else", "together"]
    assert {"measuring candidates", "making copies"} < set(steps)
    assert float(rows[-1]["s a position"]) >= max(float(row["s a position"]) for row in rows[1:-1])
    assert json.loads((tmp_path / "rows.json").read_text())


# Floors.

MINI = Shape(MODELS["mixtral"] | {"num_hidden_layers": 16})


def test_floors_count_the_weights_of_a_step() -> None:
    # The peers' table: 854 MB in bfloat16 at batch 1 for the mini shape.
    assert MINI.step_weights(2) * 2 == pytest.approx(854e6, rel=0.001)
    assert ratios([2.0, 6.0], [1.0, 2.0]) == Spread(2.5, 2.0, 3.0)


def test_floors_of_an_encoder_decoder() -> None:
    """google/switch-base-8, by hand: of the decoder, without cached keys and values."""
    shape, d, ff = Shape(MODELS["switch"]), 768, 3072
    attention, router = 4 * d * d, 8 * d
    step = 12 * (attention + attention // 2) + 6 * 2 * d * ff + 6 * router + 32128 * d
    assert shape.step_weights(0) == step
    assert shape.step_weights(3) == step + 6 * 3 * 2 * d * ff
    encoder = 12 * attention + 12 * 2 * d * ff + 6 * router + 12 * attention // 2
    assert shape.prompt_flops(7) == 2 * 7 * encoder


def test_the_floor_counts_experts_once_and_the_rest_for_every_tenant() -> None:
    one, four = (mixed_tenants.step_bytes(MINI, 8, n, 2) for n in (1, 4))
    assert one == MINI.step_weights(8) * 2
    # 16 layers of attention and router, and the head: 42 and 33 million weights of two bytes, three
    # times more.
    assert four - one == pytest.approx(3 * 2 * (16 * (2.5 * 2**20 + 8192) + 32000 * 1024), rel=1e-9)
    same = mixed_tenants.step_bytes(MINI, 8, 4, 2, ["lm_head"])
    assert same == four - 3 * 2 * 32000 * 1024


def test_sizes_that_a_model_has_not() -> None:
    with pytest.raises(SystemExit, match="--sizes d_model=3: write NAME=N of hidden_size"):
        decode.main(["--sizes", "d_model=3"])


def test_prefix_cache(tmp_path: Path) -> None:
    options = ["--dtype=float32", "--common", "20", "40", "--more=3", "--repeats=3", *SMALL]
    rows = prefix_cache.main([*MIXTRAL, *options, *outputs(tmp_path)])
    assert [r["common tokens"] for r in rows] == [20, 40, "0 of 43"]
    assert [r["tokens found"] for r in rows] == ["16", "32", "0"]
    for row in rows:
        assert row["with / without, pair by pair"].median > 0
    assert "| 40 | 32 |" in (tmp_path / "table.md").read_text()
