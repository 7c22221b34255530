"""Parts of the engine on their own: norm, routing, rotary, products, ready tenants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.mixtral import modeling_mixtral as hf

from common.families import FAMILIES, Decoder
from common.families.shape import Router
from tests import helpers
from tests.conftest import Family
from torch_engine import products
from torch_engine.experts.grouped_product import find_grouped_mm, grouped_mm_fits
from torch_engine.layers.norm import rms_norm
from torch_engine.layers.rotary import RotaryTable, rotate
from torch_engine.layers.router import route
from torch_engine.products import PlainWeight
from torch_engine.tenants.by_copy import TenantsByCopy
from torch_engine.tenants.in_place import TenantsInPlace
from torch_engine.tenants.tenant_buffer import FlatLayout
from torch_engine.tenants.weights import TenantWeights, entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_as_transformers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = hf.MixtralRMSNorm(32, eps=1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    assert torch.equal(rms_norm(x, norm.weight.detach(), 1e-5), norm(x).detach())


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (3, 1), (5, 5)])
def test_routing_equals_transformers(experts: int, top_k: int) -> None:
    router = hf.MixtralTopKRouter(
        hf.MixtralConfig(hidden_size=16, num_local_experts=experts, num_experts_per_tok=top_k)
    )
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    logits, weights, ids = router(x)
    found_weights, found_ids = route(Router(top_k, renormalise=True), logits)
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found_weights, weights)


def test_rotary_equals_transformers_beyond_the_first_table() -> None:
    raw = helpers.SIZES | {
        "model_type": "mixtral",
        "max_position_embeddings": 2048,
        "rope_theta": 1e4,
    }
    config = FAMILIES["mixtral"].parse_config(raw, "test")
    assert isinstance(config.shape, Decoder)
    table = RotaryTable(config.shape, torch.float32, torch.device("cpu"))
    positions = torch.tensor([0, 5, 511, 700, 1999])
    q = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    hf_config = hf.MixtralConfig(
        **(helpers.SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    )
    cos, sin = hf.MixtralRotaryEmbedding(hf_config)(q, positions[None])
    expected, _ = hf.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin
    )
    torch.testing.assert_close(rotate(q, *table.at(positions, 1999)), expected[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_a_loop(dtype: torch.dtype) -> None:
    """The library's grouped product is new and differs by platform, so it is held against a loop
    here too."""
    grouped_mm = find_grouped_mm()
    assert grouped_mm is not None
    assert grouped_mm_fits(32, 48, dtype, torch.device("cpu"))
    assert not grouped_mm_fits(27, 48, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 48, 32, generator=generator).to(dtype)
    x = torch.randn(12, 32, generator=generator).to(dtype)
    ends = torch.tensor([0, 3, 3, 11, 12], dtype=torch.int32)  # with empty groups
    found = grouped_mm(x, weight.transpose(1, 2), offs=ends)
    starts = [0, *ends.tolist()[:-1]]
    exact = torch.cat(
        [
            x[a:b].double() @ weight[i].double().T
            for i, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))
        ]
    )
    torch.testing.assert_close(
        found.double(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2
    )


def assert_same_weights(found: TenantWeights, expected: TenantWeights) -> None:
    assert torch.equal(found.embed, expected.embed) and torch.equal(found.norm, expected.norm)
    assert isinstance(found.head, PlainWeight) and isinstance(expected.head, PlainWeight)
    assert torch.equal(found.head.tensor, expected.head.tensor)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        for name in ("input_norm", "post_norm"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        for name in ("qkv", "o", "router"):
            assert torch.equal(getattr(mine, name).tensor, getattr(theirs, name).tensor), name


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_tenants_by_copy(family: Family, tmp_path: Path, capacity: int) -> None:
    """The path that CUDA takes, on the host's memory: flat buffers, least recently used out,
    nothing copied back."""
    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    cpu = torch.device("cpu")
    in_place = TenantsInPlace(store, torch.float32, 3, PlainWeight)
    by_copy = TenantsByCopy(store, torch.float32, cpu, capacity)
    expected_ready: list[str] = []
    copies = 0
    for name in np.random.default_rng(0).choice(family.names, size=20):
        copies += name not in expected_ready
        expected_ready = [*[n for n in expected_ready if n != name], str(name)][-capacity:]
        (weights,) = by_copy.acquire([str(name)]).values()
        assert by_copy.ready == expected_ready
        assert_same_weights(weights, in_place.acquire([str(name)])[str(name)])
    assert by_copy.switches == in_place.switches
    layout = FlatLayout.of(in_place.acquire(["ana"])["ana"].shape)
    assert by_copy.copied_bytes == copies * layout.elements * 4
    assert by_copy.device_bytes == capacity * layout.elements * 4
    if capacity == 2:
        both = by_copy.acquire(["base", "bob"])
        for name, weights in both.items():
            assert_same_weights(weights, in_place.acquire([name])[name])


def test_flat_layout_is_aligned_and_ordered(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths)
    config = store.config("base")
    assert isinstance(config.shape, Decoder)
    layout = FlatLayout.of(config.shape)
    ends = [0]
    for entry in entries(config.shape):
        offset = layout.offsets[entry.name]
        assert offset % 128 == 0 and offset >= ends[-1]
        ends.append(offset + entry.elements)
    assert list(layout.stage_ends) == sorted(layout.stage_ends)
    assert len(layout.stage_ends) == config.experts.num_layers + 2
    names = {
        store.role_tensor("base", s, e.layer) for e in entries(config.shape) for s in e.sources
    }
    assert names == set(store.family.non_expert_shapes(config))


@pytest.mark.parametrize("rows", [1, products.WIDEN_FROM_ROWS, 40])
def test_emulated_bfloat16_is_widened_for_many_rows(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "emulates_bfloat16", lambda: True)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 48, generator=generator).bfloat16() for n in (rows, 24))
    found = PlainWeight(weight).multiply(x)
    assert found.dtype == torch.bfloat16
    exact = x.double() @ weight.double().T
    assert torch.allclose(found.double(), exact, rtol=2**-7, atol=1e-2)
