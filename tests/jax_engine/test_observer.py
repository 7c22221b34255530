"""What an observer is shown in the JAX engine, against Hugging Face's routers, and what it adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from common import EngineError, SamplingParams, load_engine
from tests.helpers import assert_close, build_round_robin, padded, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily
from tests.jax_engine.residual_plans import mixed, served
from tests.jax_engine.test_oracle import EVERY_WAY, load
from tests.switch_models import (
    Model,
    hf_logits,
    sparse_mlps,
    with_capacity,
    with_residuals,
)

FREE = SamplingParams(max_new_tokens=5, ignore_eos=True)


class Seen:
    """What an observer was shown; `answer` is given back."""

    def __init__(self, answer: Any = None):
        self.calls: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.answer = answer

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        self.calls.append((tenant, layer, x, expert_ids, gates))
        return None if self.answer is None else self.answer(layer, x)


def push(layer: int, x: np.ndarray) -> np.ndarray:
    """Something that depends on layer and token."""
    return (0.3 + 0.1 * layer) * np.roll(x, 1, axis=-1)


class HuggingFaceRouters:
    """Inputs, choices and probabilities of a model's routers, of the tokens that count, a list for
    each layer.

    moved: whether to add `push` to the outputs of the sparse layers at these tokens.
    """

    def __init__(self, model: Model, mask: np.ndarray, moved: bool = False):
        self.found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        encoder_layers = model.config.num_sparse_encoder_layers

        def look(
            layer: int, x: torch.Tensor, chosen: torch.Tensor, gate: torch.Tensor
        ) -> torch.Tensor:
            live = (
                torch.as_tensor(mask).bool()
                if layer < encoder_layers
                else torch.ones(x.shape[:2], dtype=bool)
            )
            taken = live & (chosen.sum(-1) > 0)
            self.found[layer] = (
                x[taken].numpy(),
                chosen.argmax(-1)[taken].numpy(),
                gate[taken][:, 0].numpy(),
            )
            return taken

        def hook(layer: int) -> Any:
            def after(mlp: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
                (x,) = arguments
                chosen, gate, _ = mlp.router(x)
                taken = look(layer, x, chosen, gate)
                if moved:
                    output = output.clone()
                    output[taken] += torch.from_numpy(push(layer, x[taken].numpy()))
                return output

            return after

        for layer, mlp in enumerate(sparse_mlps(model)):
            mlp.register_forward_hook(hook(layer))


@pytest.mark.parametrize(
    "options", [*EVERY_WAY, pytest.param({"mesh": (2, 4)}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("slots", "capacity", "moved"),
    rest_slow([(5, None, True), (None, 2, False), ("all", 3, True)], names=3),
)
def test_an_observer_sees_what_hugging_faces_routers_do(
    tiny_family: SwitchFamily,
    tmp_path: Path,
    slots: Any,
    capacity: Any,
    options: dict[str, Any],
    moved: bool,
) -> None:
    if "mesh" in options and len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 virtual CPU devices: see tests/conftest.py")
    store = with_residuals(
        build_round_robin(tmp_path / "store", tiny_family.paths, slots=slots), mixed, merged=(0,)
    )
    model = with_capacity(served(tiny_family, store)[1], capacity or 4096)
    rows, answers = prompts(0, [9, 4, 17]), np.array(prompts(1, [6, 6, 6]))
    ids, mask = padded(rows)
    theirs = HuggingFaceRouters(model, mask, moved)
    expected = hf_logits(model, ids, answers, mask)
    seen = Seen(push if moved else None)
    with load(store, expert_capacity=capacity, **options) as engine:
        engine.observe(seen)
        assert_close(engine.logits("ana", ids, answers, mask), expected)
        assert [(tenant, layer) for tenant, layer, *_ in seen.calls] == [("ana", 0), ("ana", 1)]
        for layer, (_, _, x, expert_ids, gates) in enumerate(seen.calls):
            inputs, chosen, gate = theirs.found[layer]
            assert (x.dtype, expert_ids.dtype, gates.dtype) == (np.float32, np.int64, np.float32)
            assert np.array_equal(expert_ids, chosen[:, None])
            assert_close(x, inputs, what="inputs")
            assert_close(gates, gate[:, None], what="gates")
        if capacity:
            assert len(seen.calls[0][2]) < sum(map(len, rows))  # some were dropped
        engine.observe(None)
        engine.logits("ana", ids, answers, mask)
        assert len(seen.calls) == 2


def test_an_observer_sees_every_step_and_tenant(tiny_family: SwitchFamily, tmp_path: Path) -> None:
    store = build_round_robin(tmp_path / "store", tiny_family.paths)
    seen = Seen()
    requests = [("base", [5, 6, 7]), ("ana", [8, 9])]
    with load_engine(store) as engine:
        alone = [engine.generate(tenant, row, FREE).token_ids for tenant, row in requests]
        engine.observe(seen)
        together = engine.generate_batch(requests, FREE)
        assert [a.token_ids for a in together] == alone
        for tenant, row in requests:
            tokens = [len(x) for name, layer, x, *_ in seen.calls if (name, layer) == (tenant, 0)]
            assert tokens == [len(row)]  # the encoder reads the prompt once
            tokens = [len(x) for name, layer, x, *_ in seen.calls if (name, layer) == (tenant, 1)]
            assert tokens == [1] * 5
        with pytest.raises(
            EngineError,
            match=r"the observer returned \[3\], expected \[tokens, hidden\] = \(3, 32\)",
        ):
            engine.observe(lambda *_: np.zeros(3, np.float32))
            engine.generate("base", [5, 6, 7], FREE)
