"""Parts of the JAX engine alone: position buckets, dispatch, large configs."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersAttention,
)

from common.families import FAMILIES
from jax_engine.experts.dispatch import (
    DenseDispatch,
    Dispatch,
    FeedForward,
    LoopDispatch,
    _ragged,
    block_rows,
)
from jax_engine.experts.products import PlainProducts
from jax_engine.layers.relative_positions import relative_buckets
from jax_engine.layers.variables import Expert
from jax_engine.models.architecture import abstract_model
from jax_engine.models.spec import ModelSpec, check_shape
from tests.helpers import rest_slow


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "distance"),
    [(8, 16), (32, 128), (32, 64), (12, 20), (64, 1000), (4, 3), (16, 100), (128, 2048)],
)
def test_position_buckets_are_hugging_faces(
    buckets: int, distance: int, bidirectional: bool
) -> None:
    offsets = np.arange(-5000, 5001)
    theirs = SwitchTransformersAttention._relative_position_bucket(
        torch.from_numpy(offsets), bidirectional, buckets, distance
    )
    assert np.array_equal(
        relative_buckets(offsets, bidirectional, buckets, distance), theirs.numpy()
    )


def reference(
    x: np.ndarray, slots: np.ndarray, copies: list[list[np.ndarray]], ff: FeedForward
) -> np.ndarray:
    """Token by token in float64 numpy; relu or silu."""
    out = np.zeros_like(x, dtype=np.float64)
    for i, slot in enumerate(slots):
        if 0 <= slot < len(copies):
            wide = [w.astype(np.float64) for w in copies[slot]]
            inner = [w @ x[i] for w in wide[:-1]]
            active = (
                np.maximum(inner[0], 0)
                if ff.activation == "relu"
                else inner[0] / (1 + np.exp(-inner[0]))
            )
            out[i] = wide[-1] @ (active * inner[1] if ff.gated else active)
    return out


@pytest.mark.parametrize(
    "ff", [FeedForward("relu", False, 24), FeedForward("silu", True, 24)], ids=str
)
@pytest.mark.parametrize("way", ["loop", "dense", "ragged"])
@pytest.mark.parametrize(
    ("tokens", "slots"), rest_slow([(40, 9), (1, 4), (2, 4), (7, 1), (40, 4), (150, 3)], names=2)
)
def test_dispatch_equals_a_loop_over_tokens(
    way: str, tokens: int, slots: int, ff: FeedForward
) -> None:
    rng = np.random.default_rng(tokens)
    shapes = [(24, 16)] * (2 if ff.gated else 1) + [(16, 24)]
    copies = [
        [rng.standard_normal(s).astype(np.float32) * 0.3 for s in shapes] for _ in range(slots)
    ]
    x = rng.standard_normal((tokens, 16)).astype(np.float32)
    stack = tuple(jnp.asarray(np.stack(ws)) for ws in zip(*copies, strict=True))
    single = [tuple(jnp.asarray(w) for w in copy) for copy in copies]
    for chosen in (
        rng.integers(-1, slots, tokens),  # -1: no expert
        np.full(tokens, slots - 1),  # all to one
        np.full(tokens, -1),
        rng.integers(0, slots + 2, tokens),  # some are misses
    ):
        ids = jnp.asarray(chosen, dtype=jnp.int32)
        if way == "ragged":
            found = jax.jit(lambda x, i: _ragged(x, i, stack, ff))(x, ids)
        else:
            dispatch: Dispatch = LoopDispatch() if way == "loop" else DenseDispatch()
            held: Any = single if way == "loop" else [stack]
            found = jax.jit(lambda x, i, d=dispatch, h=held: d(x, i, h, ff))(x, ids)
        expected = reference(x, chosen, copies, ff)
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)


def test_a_tokens_result_does_not_depend_on_the_others() -> None:
    """Bit for bit in one shape: who else is there, and where, changes nothing."""
    rng = np.random.default_rng(0)
    copies = [
        tuple(jnp.asarray(rng.standard_normal(s).astype(np.float32)) for s in ((24, 16), (16, 24)))
        for _ in range(4)
    ]
    run = jax.jit(lambda x, i: LoopDispatch()(x, i, copies, FeedForward("relu", False, 24)))
    x = rng.standard_normal((32, 16)).astype(np.float32)
    whole = np.asarray(run(x, jnp.full(32, 2)))
    order = rng.permutation(32)
    mixed = rng.integers(0, 4, 32)
    mixed[:16] = 2
    other = np.asarray(run(x[order], jnp.asarray(mixed[order])))
    back = np.empty_like(other)
    back[order] = other
    assert np.array_equal(back[:16], whole[:16])


def test_blocks_grow_with_the_tokens_of_a_slot() -> None:
    sizes = [block_rows(tokens, 8) for tokens in range(1, 4096)]
    assert sizes[0] == 1 and max(sizes) == 32 and all(a <= b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("experts", "parameters"),
    rest_slow([(8, 0.62e9), (64, 3.8e9), (128, 7.4e9), (256, 14.7e9)], names=2),
)
def test_real_sizes_build_abstractly(experts: int, parameters: float) -> None:
    """google/switch-base-N, as its config.json has it, without memory. Sizes: the hub's."""
    raw = {
        "model_type": "switch_transformers",
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": experts,
        "dense_act_fn": "relu",
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
    }
    config = FAMILIES["switch_transformers"].parse_config(raw, "config.json")
    spec = ModelSpec(
        check_shape(config.shape, "base"),
        PlainProducts("float32", "float32"),
        LoopDispatch(),
        (experts,) * 12,
        32128,
    )
    _, pool, tenant = nnx.split(abstract_model(spec), Expert, nnx.Param)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves((pool, tenant)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((pool, tenant)))
    assert abs(count - parameters) < 0.03 * parameters
    assert len(jax.tree.leaves(pool)) == 12 * experts * 2
