"""Decode steps of Triton kernels against transformers, in Triton's interpreter or on a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import EngineError, SamplingParams, load_engine
from common.serving.backend import Backend, Part, Row
from tests import helpers
from tests.conftest import Family
from tests.families import tenants
from tests.helpers import assert_close, hf_greedy, rest_slow
from tests.torch_engine.residual_stores import prepared

pytest.importorskip("triton", reason="triton is not installed")

NEW = SamplingParams(max_new_tokens=3, ignore_eos=True)
ON_HOST: dict[str, Any] = {"device": "cpu", "experts": "grouped", "products": "plain"}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs without a card")

RESIDUALS = ("several parts", "some projections, tenants and experts", "scales for 7 rows")

# Sizes that torch's grouped product takes, with which the steps are compared as well.
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 24, "intermediate_size": 20},
    "qwen3_moe": {"hidden_size": 24, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "olmoe": {"hidden_size": 24, "intermediate_size": 20, "clip_qkv": 0.6},
    "granitemoe": {"hidden_size": 24, "intermediate_size": 20},
    "mixtral, window": {"hidden_size": 24, "intermediate_size": 20, "sliding_window": 4},
}


def last_logits(
    backend: Backend, prompts: dict[str, list[int]], tokens: list[int]
) -> list[np.ndarray]:
    """float32 [vocab] of each tenant after its prompt and one token more, in one decode step."""
    rows = [Row(name, tuple(prompt), 4) for name, prompt in prompts.items()]
    numbers = [backend.begin(row) for row in rows]
    backend.step([Part(n, read=r.unread) for n, r in zip(numbers, rows, strict=True)])
    step = backend.step(
        [Part(n, token_id=t, want_logits=True) for n, t in zip(numbers, tokens, strict=True)]
    )
    backend.end(numbers)
    return [values for values in step.logits if values is not None]


@interpreted
@pytest.mark.parametrize("case", rest_slow(SIZES))
def test_tokens_and_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family = case.split(",")[0]
    models, paths = tenants(family, tmp_path, num_hidden_layers=2, **SIZES[case])
    store = helpers.build_round_robin(tmp_path / "store", paths)
    oracles = dict(
        zip(paths, (helpers.oracle(models, i, store.plan) for i in range(2)), strict=True)
    )
    prompts = {name: helpers.prompts(i, [9])[0] for i, name in enumerate(paths)}
    with load_engine(store, decode="graph", **ON_HOST) as engine:
        backend = engine._require_backend()
        answers = engine.generate_batch(list(prompts.items()), NEW)
        assert engine.stats()["decode_graph_steps"] == NEW.max_new_tokens - 1
        for (name, prompt), answer in zip(prompts.items(), answers, strict=True):
            assert list(answer.token_ids) == hf_greedy(oracles[name], prompt, NEW.max_new_tokens)
        found = last_logits(backend, prompts, [a.token_ids[0] for a in answers])
    for i, (name, prompt) in enumerate(prompts.items()):
        row = [*prompt, answers[i].token_ids[0]]
        with torch.inference_mode():
            expected = oracles[name](torch.tensor([row])).logits[0, -1].float().numpy()
        assert_close(found[i], expected)


@interpreted
@pytest.mark.parametrize("case", rest_slow(RESIDUALS))
def test_residuals_and_merged_copies(family: Family, tmp_path: Path, case: str) -> None:
    store = prepared(tmp_path / "store", family.paths, case)
    oracles = [helpers.oracle_of_store(store, family.models, i) for i in range(2)]
    prompts = {name: helpers.prompts(i, [9])[0] for i, name in enumerate(store.tenants[:2])}
    with load_engine(store, decode="graph", **ON_HOST) as engine:
        found = last_logits(engine._require_backend(), prompts, [7, 9])
        assert engine.stats()["decode_graph_steps"] == 1
    for oracle, prompt, token, logits in zip(oracles, prompts.values(), (7, 9), found, strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([[*prompt, token]])).logits[0, -1].float().numpy()
        assert_close(logits, expected)


@interpreted
def test_many_rows_of_tenants_with_residuals(family: Family, tmp_path: Path) -> None:
    """Steps of one graph, with other rows each time, against torch's products and operations."""
    store = prepared(tmp_path / "store", family.paths, "several parts")
    names = [name for name in store.tenants for _ in range(5)]
    prompts = helpers.prompts(3, [4] * len(names))
    found = []
    for options in ({"decode": "graph", **ON_HOST}, {"device": "cpu", "experts": "loop"}):
        with load_engine(store, **{"products": "plain"} | options) as engine:
            backend = engine._require_backend()
            rows = [Row(n, tuple(p), 4) for n, p in zip(names, prompts, strict=True)]
            numbers = [backend.begin(row) for row in rows]
            backend.step([Part(n, read=4) for n in numbers])
            for first in (0, 5):
                some = numbers[first : first + 9]
                step = backend.step([Part(n, token_id=7 + n, want_logits=True) for n in some])
                found.append([v.copy() for v in step.logits if v is not None])
            assert engine.stats()["decode_graph_steps"] == (2 if "decode" in options else 0)
    for by_graph, plain in zip(found[:2], found[2:], strict=True):
        for logits, expected in zip(by_graph, plain, strict=True):
            assert_close(logits, expected)


@interpreted
@pytest.mark.parametrize(("case", "count"), [(None, 12), ("several parts", 18)])
def test_a_layer_takes_few_launches(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str | None, count: int
) -> None:
    from torch_engine.decode import launches
    from torch_engine.experts import residual_kernels

    counts: list[str] = []

    class Counted:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counts.append(self.kernel.__name__)
            return self.kernel[grid]

    for module, names in (
        (launches, ["multiply"]),
        (launches.rows, ["embed", "add_norm", "activate"]),
        (launches.attention, ["rotate_and_keep", "attend", "merge"]),
        (launches.routing, ["pick", "sort"]),
        (residual_kernels, ["tile_rows", "shrink", "expand"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    if case is None:
        store = helpers.build_round_robin(tmp_path / "store", family.paths)
    else:
        store = prepared(tmp_path / "store", family.paths, case)
    with load_engine(store, decode="graph", **ON_HOST) as engine:
        backend = engine._require_backend()
        rows = [Row(name, (5, 6), 4) for name in store.tenants[:2]]
        numbers = [backend.begin(row) for row in rows]
        backend.step([Part(n, read=2) for n in numbers])
        counts.clear()  # of prompts, which add residuals too
        backend.step([Part(n, token_id=7) for n in numbers])
        assert engine.stats()["decode_graph_steps"] == 1
    assert len(counts) == count * 2 + 3, counts


@interpreted
def test_tenants_that_miss_or_have_other_shapes_are_left_to_the_plain_way(tmp_path: Path) -> None:
    _, paths = tenants("mixtral", tmp_path, num_hidden_layers=1, **SIZES["mixtral"])
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=3)
    with load_engine(store, decode="graph", **ON_HOST) as engine:
        engine.generate("a", [5, 6], NEW)
        assert engine.stats()["decode_graph_steps"] == 0


def test_graph_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    _, paths = tenants("mixtral", tmp_path, num_hidden_layers=1)
    store = helpers.build_round_robin(tmp_path / "store", paths)
    with pytest.raises(EngineError, match="decode='graph' does not work here"):
        load_engine(store, device="cpu", experts="loop", decode="graph")


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.version.cuda is None or not torch.cuda.is_available(), reason="no CUDA device"
)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "granitemoe"])
def test_graphs_are_as_near_as_the_plain_way(family: str, tmp_path: Path) -> None:
    """bfloat16 on a card: errors against float32 on the CPU, of graphs and of the plain way."""
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 2
    sizes |= {"head_dim": 32} if family != "olmoe" else {}
    sizes["moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"] = 64
    _, paths = tenants(family, tmp_path, num_hidden_layers=2, **sizes)
    store = helpers.build_round_robin(tmp_path / "store", paths, dtype="bfloat16")
    prompts = {name: helpers.prompts(i, [20 + i])[0] for i, name in enumerate(paths)}
    tokens = [7, 9]
    found = {}
    for name, options in (
        ("exact", {"device": "cpu", "dtype": "float32"}),
        ("plain", {"device": "cuda", "decode": "eager"}),
        ("graph", {"device": "cuda", "decode": "graph", "ready_tenants": 2}),
    ):
        with load_engine(store, **options) as engine:
            backend = engine._require_backend()
            found[name] = last_logits(backend, prompts, tokens)
            if name == "graph":
                again = last_logits(backend, prompts, tokens)
                assert all(np.array_equal(a, b) for a, b in zip(again, found[name], strict=True))
                assert engine.stats()["decode_graph_steps"] == 2
    for exact, plain, graph in zip(*(found[n] for n in ("exact", "plain", "graph")), strict=True):
        assert np.abs(graph - exact).mean() <= 1.5 * np.abs(plain - exact).mean() + 1e-4
