"""Experts in numpy against transformers' own modules, and the activation's slope against torch's
autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersDenseActDense,
)
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from common.families import FAMILIES, ExpertSpec
from common.plan.expert_math import activate, forward, inner, inputs_and_output, slope
from tests import helpers, switch_models
from tests.helpers import assert_close

KINDS = ["silu", "gelu", "gelu_new", "relu"]


def mixtral_spec(activation: str) -> ExpertSpec:
    raw = MixtralConfig(**helpers.SIZES, hidden_act=activation).to_dict()
    return FAMILIES["mixtral"].parse_config(raw, "test").experts


def switch_spec(**fields: object) -> ExpertSpec:
    raw = SwitchTransformersConfig(**switch_models.SIZES).to_dict() | fields
    return FAMILIES["switch_transformers"].parse_config(raw, "test").experts


def inputs(size: int) -> torch.Tensor:
    return torch.randn(40, size, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("activation", [*KINDS, "swish", "gelu_pytorch_tanh"])
def test_mixtral(activation: str) -> None:
    config = MixtralConfig(**helpers.SIZES, hidden_act=activation, experts_implementation="eager")
    torch.manual_seed(0)
    module = MixtralExperts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    spec, x = mixtral_spec(activation), inputs(32)
    assert inputs_and_output(spec) == (("gate", "up"), "down")
    size = config.intermediate_size
    for expert in range(2):
        chosen = torch.full((len(x), 1), expert)
        with torch.no_grad():
            expected = module(x, chosen, torch.ones(len(x), 1)).numpy()
        fused = module.gate_up_proj[expert].detach().numpy()
        weights = {
            "gate": fused[:size],
            "up": fused[size:],
            "down": module.down_proj[expert].detach().numpy(),
        }
        assert_close(forward(spec, x.numpy(), weights), expected)
        np.testing.assert_allclose(
            inner(spec, x.numpy(), weights) @ weights["down"].T, expected, atol=1e-4
        )


@pytest.mark.parametrize("activation", KINDS)
def test_switch(activation: str) -> None:
    module = SwitchTransformersDenseActDense(
        SwitchTransformersConfig(**switch_models.SIZES, dense_act_fn=activation)
    ).eval()
    spec, x = switch_spec(dense_act_fn=activation), inputs(32)
    assert inputs_and_output(spec) == (("up",), "down")
    names = {"up": "wi", "down": "wo"}
    weights = {n: getattr(module, w).weight.detach().numpy() for n, w in names.items()}
    with torch.no_grad():
        assert_close(forward(spec, x.numpy(), weights), module(x).numpy())


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_gated_switch(activation: str) -> None:
    proj = f"gated-{activation}"
    module = T5DenseGatedActDense(
        T5Config(d_model=32, d_ff=64, feed_forward_proj=proj, dropout_rate=0.0)
    ).eval()
    spec, x = switch_spec(feed_forward_proj=proj, is_gated_act=True), inputs(32)
    assert inputs_and_output(spec) == (("gate", "up"), "down")
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    weights = {n: getattr(module, w).weight.detach().numpy() for n, w in names.items()}
    with torch.no_grad():
        assert_close(forward(spec, x.numpy(), weights), module(x).numpy())


@pytest.mark.parametrize("kind", [*KINDS, "gelu_pytorch_tanh"])
def test_activations_and_slopes(kind: str) -> None:
    x = torch.linspace(-12, 12, 4801, requires_grad=True)
    expected = ACT2FN[kind](x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    values = x.detach().numpy()
    np.testing.assert_allclose(activate(values, kind), expected.detach().numpy(), atol=3e-6)
    # Central differences; relu has no slope at 0.
    far = np.abs(values) > 0.02 if kind == "relu" else np.ones(len(values), bool)
    np.testing.assert_allclose(slope(values, kind)[far], gradient.numpy()[far], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_stay_finite(kind: str) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = activate(np.array([-1e4, -200, -80, 0, 80, 1e4], dtype=np.float32), kind)
    np.testing.assert_allclose(found, [0, 0, 0, 0, 80, 1e4], atol=1e-6)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        activate(np.zeros(3), "tanh")
