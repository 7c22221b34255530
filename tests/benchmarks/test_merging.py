"""Merging against mergekit's values, hand-computed cases, and Hugging Face's models.

tests/data/mergekit.npz was made with mergekit 0.1.5 (`GeneralizedTaskArithmeticMerge.merge_group`,
weights 1, torch seed 0, `rescale` off where it draws, `normalize` on for ties): names are method,
density and lambda.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import merging
from benchmarks.quality.merging import Recipe, merge, merge_arrays, merge_experts
from common import CheckpointError, PlanError, build_store
from common.checkpoints import open_checkpoint
from common.plan.plan import MERGED
from tests import helpers
from tests.conftest import Family


@pytest.fixture(scope="module")
def mergekit() -> dict[str, np.ndarray]:
    with np.load(helpers.DATA / "mergekit.npz") as file:
        return dict(file)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (Recipe("task_arithmetic"), "task_arithmetic_0.4"),
        (Recipe("ties"), "ties_0.2_1"),
        (Recipe("ties", scale=0.7, density=0.55), "ties_0.55_0.7"),
    ],
)
def test_equals_mergekit(recipe: Recipe, key: str, mergekit: dict[str, np.ndarray]) -> None:
    found = merge_arrays(recipe, mergekit["base"], list(mergekit["tuned"]))
    np.testing.assert_allclose(found, mergekit[key], rtol=0, atol=1e-6)
    assert np.abs(found - mergekit["base"]).max() > 0.05


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_equals_mergekit_with_its_draws(
    method: str, mergekit: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = iter(mergekit["masks_0.6"])
    monkeypatch.setattr(merging, "drop", lambda difference, rate, rng: difference * next(masks))
    found = merge_arrays(Recipe(method, scale=1.0), mergekit["base"], list(mergekit["tuned"]))
    expected = mergekit["dare_linear_0.6" if method == "dare" else "dare_ties_0.6"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_ties_by_hand() -> None:
    base = np.zeros(4, np.float32)
    tuned = [np.array(v, np.float32) for v in ([4, -1, 3, 0.5], [-2, -3, 0.1, 1], [5, 2, 0.2, -6])]
    # Half of each is kept: (4, 0, 3, 0), (-2, -3, 0, 0), (5, 0, 0, -6); signs of the sums: + - + -.
    found = merge_arrays(Recipe("ties", scale=2.0, density=0.5), base, tuned)
    assert found.tolist() == [9.0, -6.0, 6.0, -12.0]


def test_dare_drops_rescales_and_repeats() -> None:
    difference = np.ones((200, 100), np.float32)
    dropped = merging.drop(difference, 0.75, np.random.default_rng(0))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert 0.24 < (dropped > 0).mean() < 0.26
    base, tuned = np.zeros((20, 30), np.float32), [np.full((20, 30), v, np.float32) for v in (1, 2)]
    one, same = (merge_arrays(Recipe("dare", seed=3), base, tuned, "w") for _ in range(2))
    assert (one == same).all()
    for other in (
        merge_arrays(Recipe("dare", seed=4), base, tuned, "w"),
        merge_arrays(Recipe("dare"), base, tuned, "v"),
    ):
        assert (one != other).any()
    # scale 0.4, half dropped and the rest doubled: tenants' entries are dropped independently of
    # each other.
    assert set(np.unique(np.round(one, 5))) == set(np.round(np.float32([0, 0.8, 1.6, 2.4]), 5))


def test_average_is_the_mean_of_all_weights(family: Family, tmp_path: Path) -> None:
    merge(Recipe("average"), family.paths, None, tmp_path / "out")
    found = helpers.load(tmp_path / "out")
    expected = [
        sum(each) / 3 for each in zip(*(m.parameters() for m in family.models), strict=True)
    ]
    for parameter, mean in zip(found.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, mean, rtol=0, atol=1e-6)


def test_merged_experts_leave_other_layers(family: Family, tmp_path: Path) -> None:
    tenants = {name: family.paths[name] for name in ("ana", "bob")}
    build_store(tmp_path / "store", tenants, policy="round_robin")
    store = merge_experts(
        tmp_path / "store", Recipe("task_arithmetic", scale=1.0), family.paths["base"]
    )
    assert {c.owner for c in store.plan.copies} == {MERGED} and store.extra_bytes == 0
    store.export("bob", tmp_path / "bob")
    found, own, base, ana = (
        open_checkpoint(tmp_path / "bob"),
        *(open_checkpoint(family.paths[n]) for n in ("bob", "base", "ana")),
    )
    for name, ref in found.tensors.items():
        if ".experts." in name:
            expected = (
                own.tensors[name].read() + ana.tensors[name].read() - base.tensors[name].read()
            )
            np.testing.assert_allclose(ref.read(), expected, rtol=0, atol=1e-5)
        else:
            assert (ref.read() == own.tensors[name].read()).all()


def test_what_cannot_be_merged_is_named(family: Family, tmp_path: Path) -> None:
    wide = helpers.save(helpers.random_mixtral(3, vocab_size=100), tmp_path / "wide")
    with pytest.raises(
        CheckpointError, match=r"tensor model.embed_tokens.weight of wide is \[100, 32\], base has"
    ):
        merge(
            Recipe("average"), {"base": family.paths["base"], "wide": wide}, None, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    other = helpers.save(helpers.random_mixtral(3, num_local_experts=2), tmp_path / "other")
    with pytest.raises(CheckpointError, match="the base cannot be merged with ana"):
        merge(Recipe("ties"), {"ana": family.paths["ana"]}, other, tmp_path / "out")
    with pytest.raises(PlanError, match="give it with --base"):
        merge(Recipe("ties"), family.paths, None, tmp_path / "out")
    for bad in ({"scale": float("nan")}, {"density": 0.0}, {"drop": 1.0}, {"lambda": 1}):
        with pytest.raises(PlanError, match=f"{next(iter(bad))}"):
            Recipe.of("ties", bad)
    with pytest.raises(PlanError, match="no merging method 'mean'"):
        Recipe("mean")
