"""What an observer is shown, against what Hugging Face routes, and what it adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import SamplingParams, load_engine
from tests import helpers
from tests.conftest import Family
from tests.helpers import assert_close, hf_logits
from tests.torch_engine.residual_stores import WAYS, prepared

NEW = SamplingParams(max_new_tokens=8, ignore_eos=True)


class Recorder:
    """Keeps what it is shown; returns `added` times x."""

    def __init__(self, added: float | None = None):
        self.seen: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.added = added

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        self.seen.append((tenant, layer, x, expert_ids, gates))
        return None if self.added is None else x * np.float32(self.added)


def routing(
    model: Any, row: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Router input [T, H], chosen experts and gates [T, K] of each layer, from transformers' own
    modules."""
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, args, out: seen.append((args[0].reshape(-1, 32), out[2], out[1]))
        )
        for layer in model.model.layers
    ]
    hf_logits(model, [row])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_observer_sees_what_hugging_face_routes(
    family: Family, tmp_path: Path, way: dict[str, Any]
) -> None:
    store = prepared(tmp_path / "store", family.paths, "several parts", slots=5)
    oracles = [helpers.oracle_of_store(store, family.models, i) for i in range(3)]
    prompts = helpers.prompts(2, (6, 11))
    recorder = Recorder()
    with load_engine(store, **way) as engine:
        engine.observe(recorder)
        answers = engine.generate_batch(
            [("ana", prompts[0]), ("bob", prompts[1])], SamplingParams(max_new_tokens=4)
        )
        seen = recorder.seen
        engine.observe(None)
        recorder.seen = []
        engine.generate("ana", prompts[0], NEW)
        assert not recorder.seen
    for name, prompt, answer, oracle in zip(
        ("ana", "bob"), prompts, answers, oracles[1:], strict=True
    ):
        expected = routing(
            oracle, [*prompt, *answer.token_ids[:-1]]
        )  # the last token is never read
        for layer, (x, ids, gates) in enumerate(expected):
            mine = [s for s in seen if s[0] == name and s[1] == layer]
            assert [len(s[2]) for s in mine] == [len(prompt)] + [1] * (len(answer.token_ids) - 1)
            found_x, found_ids, found_gates = (
                np.concatenate([s[i] for s in mine]) for i in (2, 3, 4)
            )
            assert (found_x.dtype, found_ids.dtype, found_gates.dtype) == (
                np.float32,
                np.int64,
                np.float32,
            )
            assert_close(found_x, x.numpy(), what="x")
            assert (found_ids == ids.numpy()).all()
            assert_close(found_gates, gates.float().numpy(), what="gates")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_the_observer_returns_is_added(
    family: Family, tmp_path: Path, way: dict[str, Any]
) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=5)
    model = helpers.oracle(family.models, 1, store.plan)
    rows = helpers.prompts(2, (6, 11))
    plain = [hf_logits(model, [row])[0] for row in rows]
    for layer in model.model.layers:
        # The experts' weighted sum, plus half of what they read.
        layer.mlp.experts.register_forward_hook(
            lambda _m, args, out: out + 0.5 * args[0].reshape(out.shape)
        )
    expected = [hf_logits(model, [row])[0] for row in rows]
    assert np.abs(expected[0] - plain[0]).max() > 0.1
    with load_engine(store, **way) as engine:
        engine.observe(Recorder(0.5))
        for found, row, e in zip(engine.logits("ana", rows), rows, expected, strict=True):
            assert_close(found[: len(row)], e)
        engine.observe(None)
        assert_close(engine.logits("ana", rows[:1])[0], plain[0])


def test_an_observer_that_returns_another_shape_is_refused(family: Family, tmp_path: Path) -> None:
    with load_engine(helpers.build_round_robin(tmp_path / "store", family.paths)) as engine:
        engine.observe(lambda _t, _l, x, _i, _g: x[:1])
        with pytest.raises(ValueError, match=r"the observer returned \[1, 32\] for x \[5, 32\]"):
            engine.logits("ana", helpers.prompts(0, [5]))
