"""What a profile holds, against Hugging Face's own routers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import common.build.calibration
from common import RequestError, UnknownTenantError, build_store, load_engine
from common.build.calibration import (
    LEAST_SAMPLES,
    MOST_SAMPLES,
    SAMPLE_BYTES,
    alone,
    calibrate,
    usual_samples,
)
from common.build.examples import CalibrationSet, Example
from common.build.scoring import divergence, iter_logits, log_softmax, rows_of
from common.plan.profile import Profile
from common.store.profiles import load_profile
from tests import helpers, switch_models
from tests.helpers import hf_greedy, prompts
from tests.oracle.build.case import MANY, NAMES, SIZES, Case

Seen = list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]
"""(layer, inputs [T, H], expert ids [T, K], gates [T, K]) of every call"""


@torch.inference_mode()
def mixtral_routing(model: Any, rows: list[list[int]]) -> Seen:
    seen: Seen = []
    hooks = []
    for n, layer in enumerate(model.model.layers):

        def hook(module: Any, given: Any, n: int = n, layer: Any = layer) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            chances = torch.softmax(x @ layer.mlp.gate.weight.T, dim=-1)
            gates, ids = chances.topk(2, dim=-1)
            gates = gates / gates.sum(dim=-1, keepdim=True)
            seen.append((n, x.numpy(), ids.numpy(), gates.numpy()))

        hooks.append(layer.mlp.register_forward_pre_hook(hook))
    for row in rows:
        model(torch.tensor([row]))
    for h in hooks:
        h.remove()
    return seen


@torch.inference_mode()
def switch_routing(model: Any, rows: list[list[int]], answers: list[list[int]]) -> Seen:
    seen: Seen = []
    hooks = []
    for n, mlp in enumerate(switch_models.sparse_mlps(model)):

        def hook(module: Any, given: Any, n: int = n, mlp: Any = mlp) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            chances = torch.softmax(x @ mlp.router.classifier.weight.T, dim=-1)
            gates, ids = chances.max(dim=-1, keepdim=True)
            seen.append((n, x.numpy(), ids.numpy(), gates.numpy()))

        hooks.append(mlp.register_forward_pre_hook(hook))
    for row, answer in zip(rows, answers, strict=True):
        model(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([[0, *answer]]))
    for h in hooks:
        h.remove()
    return seen


def check_profile(profile: Profile, seen: Seen) -> None:
    layers, experts = profile.counts.shape
    for layer in range(layers):
        x, ids, gates = (np.concatenate([s[i] for s in seen if s[0] == layer]) for i in (1, 2, 3))
        assert profile.tokens[layer] == len(x)
        assert profile.counts[layer].sum() == ids.size
        for expert in range(experts):
            rows, choices = np.nonzero(ids == expert)
            mine = gates[rows, choices]
            assert profile.counts[layer, expert] == len(rows)
            assert profile.gate_squares[layer, expert] == pytest.approx(
                float((mine.astype(float) ** 2).sum()), rel=1e-4
            )
            found, kept = profile.sample(layer, expert)
            if not len(rows):
                assert found.shape == (0, x.shape[1]) and kept.shape == (0,)
                continue
            assert found.shape == (len(rows), x.shape[1]) and found.dtype == np.float32
            # The order is drawn: every kept row is one of the router's, with its own gate, and none
            # is kept twice.
            far = np.abs(found[:, None] - x[rows][None]).max(axis=2) + np.abs(
                kept[:, None] - mine[None]
            )
            near = far.argmin(axis=1)
            assert far.min(axis=1).max() < 1e-3
            assert len(set(near.tolist())) == len(rows)


def test_mixtral_profiles_are_what_the_router_does(mixtral: Case) -> None:
    found = calibrate(mixtral.store, mixtral.sets, samples=MANY)
    assert list(found) == list(NAMES)
    for name, model in zip(NAMES, mixtral.models, strict=True):
        rows = [list(e.prompt) for e in mixtral.sets[name].examples]
        check_profile(found[name], mixtral_routing(model, rows))  # type: ignore[arg-type]
        assert (found[name].sensitivity > 0).all() and found[name].sensitivity.shape == (2,)


@pytest.mark.slow
def test_switch_profiles_are_what_the_routers_of_both_sides_do(switch: Case) -> None:
    found = calibrate(switch.store, switch.sets, samples=MANY)
    for name, model in zip(switch.paths, switch.models, strict=True):
        examples = switch.sets[name].examples
        answers = [list(e.answer or ())[:-1] for e in examples]
        seen = switch_routing(model, [list(e.prompt) for e in examples], answers)  # type: ignore[arg-type]
        check_profile(found[name], seen)
        # Prompts in the encoder; in the decoder the answers behind a start token, without their
        # last tokens.
        assert found[name].tokens.tolist() == [20 + 9 + 14, 6 + 1 + 9]
        assert (found[name].sensitivity > 0).all()


def test_a_sample_is_drawn_evenly(mixtral: Case) -> None:
    (whole,), (part,) = (
        calibrate(mixtral.store, {"ana": mixtral.sets["ana"]}, samples=n).values()
        for n in (MANY, 4)
    )
    assert np.diff(part.starts).tolist() == np.minimum(4, np.diff(whole.starts)).tolist()
    np.testing.assert_array_equal(part.counts, whole.counts)
    np.testing.assert_array_equal(part.gate_squares, whole.gate_squares)
    for layer in range(2):
        for expert in range(3):
            some, every = part.sample(layer, expert)[0], whole.sample(layer, expert)[0]
            assert all((row == every).all(axis=1).sum() == 1 for row in some)
    again = calibrate(mixtral.store, {"ana": mixtral.sets["ana"]}, samples=4)["ana"]
    np.testing.assert_array_equal(again.inputs, part.inputs)


def test_how_much_is_kept_follows_from_the_experts_size(
    mixtral: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as fits are better for, but no more bytes than a large model's store has room for."""
    spec = mixtral.store.experts
    assert usual_samples(spec) == MOST_SAMPLES
    large = replace(spec, expert_layers=tuple(map(str, range(32))), num_experts=8, hidden_size=4096)
    assert usual_samples(large) == LEAST_SAMPLES == SAMPLE_BYTES // (4 * 4096 * 32 * 8)
    monkeypatch.setattr(common.build.calibration, "LEAST_SAMPLES", 2)
    monkeypatch.setattr(common.build.calibration, "MOST_SAMPLES", 3)
    found = calibrate(mixtral.store, {"ana": mixtral.sets["ana"]})["ana"]
    assert np.diff(found.starts).max() == 3
    for wrong in (0, True, 2.0):
        with pytest.raises(RequestError, match=f"samples is {wrong}; give a whole number from 1"):
            calibrate(mixtral.store, {"ana": mixtral.sets["ana"]}, samples=wrong)  # type: ignore[arg-type]


def test_answers_are_generated_where_they_are_not_given(mixtral: Case) -> None:
    (prompt,) = prompts(7, [11])
    with load_engine(alone(mixtral.store), dtype="float32") as engine:
        (row,) = rows_of(engine, "ana", CalibrationSet.of([prompt], max_new_tokens=5))
        expected = hf_greedy(mixtral.models[1], prompt, 5, eos=2)
        # The last token is foretold and not read.
        assert row.prompt == (*prompt, *expected[:-1]) and row.answer == () and row.first == 10
        given = rows_of(engine, "ana", CalibrationSet((Example(prompt, expected),)))
        assert given == [row]
        (logits,) = iter_logits(engine, "ana", [row])
        whole = helpers.hf_logits(mixtral.models[1], [list(row.prompt)])[0]
        helpers.assert_close(logits, whole[10:])
        assert logits.argmax(axis=-1).tolist() == expected, (
            "each logit is that of an answer's token"
        )
        # Longer than the context: cut, and something is left to be scored.
        (cut,) = rows_of(engine, "ana", CalibrationSet((Example([5] * 300, [6]),)))
        assert len(cut.prompt) == 256 and cut.first == 255
        assert [len(v) for v in iter_logits(engine, "ana", [cut, row])] == [1, len(whole) - 10]


def test_the_end_of_sequence_is_the_last_token_foretold(mixtral: Case, switch: Case) -> None:
    """Nothing comes after it when a tenant serves: what a model would say there is neither scored
    nor shown."""
    eos, prompt = 2, prompts(7, [11])[0]
    with load_engine(alone(mixtral.store), dtype="float32") as engine:
        rows = rows_of(
            engine, "ana", CalibrationSet((Example(prompt, [5, 6, eos]), Example(prompt, [eos])))
        )
        assert [(r.prompt, r.first) for r in rows] == [((*prompt, 5, 6), 10), (tuple(prompt), 10)]
        assert [len(v) for v in iter_logits(engine, "ana", rows)] == [3, 1]
        # A text goes on: what is said behind its last token counts.
        (text,) = rows_of(engine, "ana", CalibrationSet.texts([prompt]))
        assert [len(v) for v in iter_logits(engine, "ana", [text])] == [11]
    with load_engine(alone(switch.store), dtype="float32") as engine:
        rows = rows_of(
            engine, "ana", CalibrationSet((Example(prompt, [5, 6, 1]), Example(prompt, [1])))
        )
        assert [r.answer for r in rows] == [(5, 6), ()]
        assert [len(v) for v in iter_logits(engine, "ana", rows)] == [3, 1]


def test_an_answer_longer_than_the_decoder_reads_is_cut(switch: Case) -> None:
    longest = switch.store.config("base").max_positions
    with load_engine(alone(switch.store), dtype="float32") as engine:
        (row,) = rows_of(engine, "base", CalibrationSet((Example([5] * 7, [6] * (longest + 5)),)))
    assert len(row.answer) == longest - 1 and len(row.prompt) == 7


# Divergence and sensitivity.


def test_divergence_is_torchs() -> None:
    rng = np.random.default_rng(0)
    own, served = (rng.standard_normal((6, 40)).astype(np.float32) * 8 for _ in range(2))
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(served).double(), -1),
        torch.log_softmax(torch.from_numpy(own).double(), -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    np.testing.assert_allclose(divergence(own, served), expected.numpy(), rtol=1e-9)
    assert divergence(own, own).tolist() == [0.0] * 6
    assert np.isfinite(log_softmax(np.array([[1e30, 0.0], [-1e4, 1e4]], dtype=np.float32))).all()


def test_sensitivity_is_positive_where_experts_differ(tmp_path: Path) -> None:
    """The tenant's own layers' experts are another's in layer 1 only."""
    base = helpers.random_mixtral(0, **SIZES)
    other = helpers.tuned(base, 1)
    for projection in ("gate_up_proj", "down_proj"):
        mine, theirs = (getattr(m.model.layers[0].mlp.experts, projection) for m in (base, other))
        theirs.data.copy_(mine.data)
    paths = {
        n: helpers.save(m, tmp_path / n)
        for n, m in (("base", base), ("other", other), ("twin", base))
    }
    sets = {"base": CalibrationSet.texts(prompts(0, [20] * 4))}
    store = build_store(
        tmp_path / "store", {n: paths[n] for n in ("base", "other")}, calibration=sets
    )
    profile = load_profile(store, "base")
    assert profile is not None and profile.sensitivity[0] == 0 and profile.sensitivity[1] > 0
    for names in (["base", "twin"], ["base"]):
        store = build_store(tmp_path / "store", {n: paths[n] for n in names}, calibration=sets)
        profile = load_profile(store, "base")
        assert profile is not None and profile.sensitivity.tolist() == [0, 0]


def test_sensitivity_predicts_what_a_small_change_does(mixtral: Case) -> None:
    """Divergence by squared error is nearly the same for a change of half the size."""
    store = mixtral.store
    base = helpers.random_mixtral(0, **SIZES)
    found = []
    for size in (0.02, 0.01):
        paths = {
            "base": mixtral.paths["base"],
            "near": helpers.save(helpers.tuned(base, 5, size), mixtral.root / "near"),
        }
        near = build_store(mixtral.root / "second", paths, policy="round_robin")
        found.append(calibrate(near, {"base": mixtral.sets["base"]})["base"].sensitivity)
    np.testing.assert_allclose(found[0], found[1], rtol=0.3)
    assert store.tenants == NAMES


def test_what_cannot_be_measured_is_refused(mixtral: Case) -> None:
    store = mixtral.store
    refused: list[tuple[type[Exception], str, CalibrationSet, str]] = [
        (RequestError, "calibration of 'ana' holds no example", CalibrationSet(()), "ana"),
        (UnknownTenantError, "no tenant 'eve'", CalibrationSet.texts([[3, 4]]), "eve"),
        (RequestError, "tokenizer", CalibrationSet.texts(["text without a tokenizer"]), "ana"),
        (RequestError, "empty", CalibrationSet.texts([[]]), "ana"),
        (RequestError, "outside the vocabulary", CalibrationSet.texts([[3, 96]]), "ana"),
    ]
    for kind, message, examples, name in refused:
        with pytest.raises(kind, match=message):
            calibrate(store, {name: examples})
