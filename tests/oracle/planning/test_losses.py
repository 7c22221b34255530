"""Predicted losses against what experts do on the samples, and the scales of what was not
sampled."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from common import Store, build_store
from common.build.build import add_tenant
from common.build.examples import CalibrationSet
from common.dtypes import to_float32
from common.plan.distance import Distances
from common.plan.expert_math import forward
from common.plan.profile import Profile
from common.planning.losses import (
    Losses,
    gram_of_distances,
    losses_of_weights,
    measure_losses,
    square_matrices,
)
from common.store.profiles import load_profile
from tests import helpers
from tests.helpers import prompts

NAMES = ("base", "ana", "bob")
SIZES = {
    "num_local_experts": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, near each other, and a store of them, calibrated."""
    root = tmp_path_factory.mktemp("losses")
    base = helpers.random_mixtral(0, **SIZES)
    models = [base, helpers.tuned(base, 1, 0.005), helpers.tuned(base, 2, 0.005)]
    paths = {n: helpers.save(m, root / n) for n, m in zip(NAMES, models, strict=True)}
    sets = {n: CalibrationSet.texts(prompts(i, [30] * 10)) for i, n in enumerate(NAMES)}
    build_store(root / "store", paths, policy="round_robin", calibration=sets)
    return root


@pytest.fixture(scope="module")
def store(root: Path) -> Store:
    return Store.open(root / "store")


@pytest.fixture(scope="module")
def profiles(store: Store) -> dict[str, Profile]:
    found = {n: load_profile(store, n) for n in store.tenants}
    return {n: p for n, p in found.items() if p is not None}


# Errors of experts are computed in float32, and how a BLAS orders its sums depends on the rows that
# it is given. Sums that cancel lose up to two digits of the seven. A wrong rule is off by more than
# a hundredth.
ROUNDING = 1e-5


def own(store: Store, tenant: int, layer: int, expert: int) -> dict[str, np.ndarray]:
    refs = store.copy_refs(NAMES[tenant], layer, expert)
    return {name: to_float32(ref.read()) for name, ref in refs.items()}


def true_loss(
    store: Store,
    profile: Profile,
    tenant: int,
    place: tuple[int, int],
    weights: dict[str, np.ndarray],
) -> float:
    """Divergence a token that the tenant is charged with for being served `weights`, in the loss's
    own words."""
    layer, expert = place
    x, gates = profile.sample(layer, expert)
    error = forward(store.experts, x, weights) - forward(
        store.experts, x, own(store, tenant, layer, expert)
    )
    squared = gates.astype(np.float64) ** 2
    mean = float(squared @ (error.astype(np.float64) ** 2).sum(axis=1)) / squared.sum()
    # E[g^2 |error|^2] a token: the mean over what the router sent here, by how much of all gates
    # that was.
    return (
        mean
        * profile.gate_squares[layer, expert]
        / profile.tokens[layer]
        * profile.sensitivity[layer]
    )


def places(store: Store) -> list[tuple[int, int]]:
    return list(product(range(store.experts.num_layers), range(store.experts.num_experts)))


def test_the_loss_of_another_tenants_expert_is_exact(
    store: Store, profiles: dict[str, Profile]
) -> None:
    losses = measure_losses(store, profiles)
    assert losses.measured == NAMES and losses.unit == "nats" and losses.sampled.all()
    single = losses.single()
    for t, c in product(range(3), range(3)):
        for place in places(store):
            expected = true_loss(store, profiles[NAMES[t]], t, place, own(store, c, *place))
            assert single[t, *place, c] == pytest.approx(expected, rel=1e-6, abs=1e-18)
            one = np.eye(3)[c]
            assert losses.of(t, *place, one) == single[t, *place, c]
        assert (single[t, :, :, t] == 0).all()
    for t, name in enumerate(NAMES):
        picked = profiles[name].counts / profiles[name].tokens[:, None]
        np.testing.assert_allclose(losses.frequency[t], picked)
        np.testing.assert_allclose(losses.frequency[t].sum(axis=1), store.experts.top_k)


def test_the_loss_of_a_mixture_is_near_that_of_the_mixed_weights(
    store: Store, profiles: dict[str, Profile]
) -> None:
    losses = measure_losses(store, profiles)
    rng = np.random.default_rng(0)
    for place in places(store):
        mix = rng.dirichlet([1, 1, 1])
        every = [own(store, c, *place) for c in range(3)]
        mixed = {n: sum(w * m[n] for w, m in zip(mix, every, strict=True)) for n in every[0]}
        for t in range(3):
            expected = true_loss(store, profiles[NAMES[t]], t, place, mixed)
            assert losses.of(t, *place, mix) == pytest.approx(expected, rel=0.1)


def test_by_weights_the_loss_is_the_squared_distance(store: Store) -> None:
    losses = measure_losses(store, {})
    assert losses.unit == "squared distance" and losses.measured == () and not losses.sampled.any()
    share = store.experts.top_k / store.experts.num_experts
    rng = np.random.default_rng(1)
    for place in places(store):
        every = [own(store, c, *place) for c in range(3)]
        for t, mix in product(range(3), [*np.eye(3), rng.dirichlet([1, 1, 1]), np.full(3, 1 / 3)]):
            squared = sum(
                float(
                    (
                        sum(
                            w * (m[n].astype(np.float64) - every[t][n])
                            for w, m in zip(mix, every, strict=True)
                        )
                        ** 2
                    ).sum()
                )
                for n in every[t]
            )
            assert losses.of(t, *place, mix) == pytest.approx(share * squared, rel=1e-4, abs=1e-9)
    assert (losses.frequency == share).all() and (losses.scale == share).all()


def test_grams_of_distances_are_products_of_differences() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((4, 9))
    gram = gram_of_distances(((points[:, None] - points) ** 2).sum(axis=2))
    for t, c, d in product(range(4), repeat=3):
        assert gram[t, c, d] == pytest.approx(
            float((points[c] - points[t]) @ (points[d] - points[t])), abs=1e-12
        )


def test_squared_distances_by_position() -> None:
    distances = Distances(("a", "b", "c"), np.arange(1.0, 13.0).reshape(3, 2, 2))
    found = square_matrices(distances)
    assert found.shape == (2, 2, 3, 3)
    for (a, b), values in zip([(0, 1), (0, 2), (1, 2)], distances.matrix, strict=True):
        np.testing.assert_array_equal(found[:, :, a, b], values**2)
        np.testing.assert_array_equal(found[:, :, b, a], values**2)
    assert (np.einsum("leaa->lea", found) == 0).all()
    losses = losses_of_weights(distances, 1)
    assert losses.single()[1, 1, 0, 2] == pytest.approx(distances.matrix[2, 1, 0] ** 2 / 2)


# What was not sampled.


def without(profile: Profile, layer: int, expert: int) -> Profile:
    """The profile as if calibration had never picked an expert."""
    place = layer * profile.counts.shape[1] + expert
    rows = slice(int(profile.starts[place]), int(profile.starts[place + 1]))
    starts = profile.starts.copy()
    starts[place + 1 :] -= rows.stop - rows.start
    counts, gates = profile.counts.copy(), profile.gate_squares.copy()
    counts[layer, expert] = gates[layer, expert] = 0
    return replace(
        profile,
        counts=counts,
        gate_squares=gates,
        starts=starts,
        inputs=np.delete(profile.inputs, rows, axis=0),
        gates=np.delete(profile.gates, rows),
    )


def check_consistent(losses: Losses, store: Store) -> None:
    """`scale` is what turns squared differences of weights into the loss where nothing was
    sampled."""
    squared = square_matrices(store.distances)
    single = losses.single()
    for t, layer, expert in np.argwhere(~losses.sampled):
        np.testing.assert_allclose(
            single[t, layer, expert],
            losses.scale[t, layer, expert] * squared[layer, expert, t],
            rtol=1e-9,
        )


def test_an_expert_that_was_never_picked_counts_as_picked_once(
    store: Store, profiles: dict[str, Profile]
) -> None:
    usual = measure_losses(store, profiles)
    made = measure_losses(store, profiles | {"ana": without(profiles["ana"], 1, 2)})
    assert not made.sampled[1, 1, 2] and made.sampled.sum() == made.sampled.size - 1
    check_consistent(made, store)
    found, before = made.single()[1, 1, 2, [0, 2]], usual.single()[1, 1, 2, [0, 2]]
    per_pick = before / profiles["ana"].counts[1, 2]
    # Once, with the usual error of its layer for so large a difference: the right size.
    assert (found > 0.2 * per_pick).all() and (found < 5 * per_pick).all()
    others = np.ones(made.sampled.shape, bool)
    others[1, 1, 2] = False
    np.testing.assert_allclose(made.gram[others], usual.gram[others], rtol=ROUNDING)
    assert made.frequency[1, 1, 2] == 0


def test_a_tenant_without_calibration_counts_as_the_usual_one(
    store: Store, profiles: dict[str, Profile]
) -> None:
    usual = measure_losses(store, profiles)
    made = measure_losses(store, {n: p for n, p in profiles.items() if n != "bob"})
    assert made.measured == ("base", "ana") and made.unit == "nats" and not made.sampled[2].any()
    check_consistent(made, store)
    np.testing.assert_allclose(made.gram[:2], usual.gram[:2], rtol=ROUNDING)
    ratio = made.single()[2].sum() / usual.single()[2].sum()
    assert 0.2 < ratio < 5


def test_calibration_that_says_nothing_leaves_differences_their_price(
    store: Store, profiles: dict[str, Profile]
) -> None:
    """Samples of experts alone that all tenants have in common: what differs is not free for
    that."""
    base = profiles["base"]
    empty = base
    for place in places(store):
        empty = without(empty, *place)
    made = measure_losses(store, {"base": empty})
    assert made.unit == "squared distance" and (made.single()[0, :, :, 1] > 0).all()
    np.testing.assert_allclose(made.gram, measure_losses(store, {}).gram, rtol=ROUNDING)
    # Sampled where nothing differs, never picked where experts do.
    matrix = store.distances.matrix.copy()
    matrix[:, 0] = 0.0

    class Alike(Store):
        distances = Distances(store.tenants, matrix)

        def copy_refs(self, name: str, layer: int, expert: int):  # type: ignore[no-untyped-def]
            return super().copy_refs("base" if layer == 0 else name, layer, expert)

    for expert in range(3):
        base = without(base, 1, expert)
    made = measure_losses(Alike(store.path, store.manifest), {"base": base})
    assert made.sampled[0, 0].all() and not made.sampled[0, 1].any()
    assert (made.single()[:, 0] == 0).all()
    assert (made.single()[0, 1, :, 1] > 0).all() and (made.single()[2, 1, :, 1] > 0).all()


def test_a_layer_without_sensitivity_has_the_usual_one(
    store: Store, profiles: dict[str, Profile]
) -> None:
    base = profiles["base"]
    unknown = replace(base, sensitivity=np.array([0.0, base.sensitivity[1]]))
    made, usual = (
        measure_losses(store, profiles | {"base": unknown}),
        measure_losses(store, profiles),
    )
    ratio = base.sensitivity[1] / base.sensitivity[0]
    np.testing.assert_allclose(made.gram[0, 0], usual.gram[0, 0] * ratio, rtol=ROUNDING)
    np.testing.assert_allclose(made.gram[0, 1], usual.gram[0, 1], rtol=ROUNDING)
    # A tenant of which none is known is measured with the others' rule, not in another unit.
    none = replace(base, sensitivity=np.zeros(2))
    made = measure_losses(store, profiles | {"base": none})
    for layer in range(2):
        usual_here = np.median([profiles[n].sensitivity[layer] for n in ("ana", "bob")])
        np.testing.assert_allclose(
            made.gram[0, layer],
            usual.gram[0, layer] * usual_here / base.sensitivity[layer],
            rtol=ROUNDING,
        )
    assert made.unit == "nats"
    alone = measure_losses(store, {"base": none})
    assert alone.unit == "squared error"
    np.testing.assert_allclose(
        alone.gram[0, 0], usual.gram[0, 0] / base.sensitivity[0], rtol=ROUNDING
    )


def test_a_tenant_calibrated_when_it_was_alone(root: Path, tmp_path: Path) -> None:
    sets = {"base": CalibrationSet.texts(prompts(0, [20] * 3))}
    build_store(tmp_path / "store", {"base": root / "base"}, calibration=sets)
    store = add_tenant(tmp_path / "store", "ana", root / "ana")
    profile = load_profile(store, "base")
    assert profile is not None and (profile.sensitivity == 0).all() and profile.counts.sum() > 0
    assert (
        store.manifest.prediction is not None
        and store.manifest.prediction["unit"] == "squared error"
    )
    again = add_tenant(
        tmp_path / "store",
        "bob",
        root / "bob",
        calibration=CalibrationSet.texts(prompts(2, [20] * 3)),
    )
    assert again.manifest.prediction is not None and again.manifest.prediction["unit"] == "nats"


def test_one_tenant_loses_nothing(root: Path, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", {"base": root / "base"})
    losses = measure_losses(store, {})
    assert losses.gram.shape == (1, 2, 3, 1, 1) and (losses.gram == 0).all()
