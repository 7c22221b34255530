"""`moetel plan`: the table, the picture, the recommended budget, planning anew, and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import Store, add_tenant
from common.planning.planner import Planner
from scripts import cli
from scripts.commands.plan import EXTRAS, Asked, Offer, offers, recommended
from tests import helpers


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `moetel plan ARGUMENTS`."""
    try:
        code = cli.main(["plan", *map(str, arguments)])
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def rows(out: str) -> list[list[str]]:
    """Cells of the table's lines below its head."""
    lines = [line.strip("│┃ ") for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")] for line in lines]


def one_model(path: Path) -> int:
    found = Store.open(path)
    return found.experts.num_positions * found.copy_bytes


def test_a_table_of_budgets(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = helpers.fingerprint(store)
    code, out, _ = run(capsys, store)
    assert code == 0
    assert "policy residual, predicted loss in squared distance" in " ".join(out.split())
    for word in ("extra", "mean", "worst", "base", "ana", "bob"):
        assert word in out
    assert "no tenant is calibrated: distances of weights stand in" in out
    body = rows(out)
    assert len(body) == len(EXTRAS)
    extra = [float(re.findall(r"([\d.]+)%", " ".join(row))[0]) for row in body]
    assert extra == sorted(extra) and extra[0] == 0
    # Not more than what was asked, which is a share of one model's bytes.
    assert all(used <= 100 * asked + 0.05 for used, asked in zip(extra, EXTRAS, strict=True))
    assert len([line for line in out.splitlines() if "->" in line]) == 1
    assert "recommended: --extra" in out
    assert helpers.fingerprint(store) == before, "nothing is changed unasked"


def test_the_table_is_what_the_planner_reckons(store: Path) -> None:
    opened = Store.open(store)
    planner = Planner(opened)
    whole = one_model(store)
    fixed = max(opened.non_expert_bytes(n) for n in opened.tenants)
    budgets = [
        Asked(extra=0.0),
        Asked(budget_bytes=fixed + whole + whole // 5),
        Asked(extra=2.0),
        Asked(extra=9.0),
    ]
    found = offers(opened, planner, "residual", budgets)
    allocator = planner.allocator("residual")
    for offer, asked, nbytes in zip(
        found, budgets, (0, whole // 5, 2 * whole, 9 * whole), strict=True
    ):
        made = allocator.allocate(whole + nbytes)
        assert offer.nbytes == made.nbytes + fixed and offer.asked == asked
        assert offer.extra == pytest.approx(made.nbytes / whole - 1)
        np.testing.assert_allclose(offer.losses, made.losses.sum(axis=0))
    assert found[-1].losses.max() < 0.01 * found[0].losses.max()


def offer(mean: float, worst: float) -> Offer:
    return Offer(Asked(), 0.0, 0, np.array([2 * mean - worst, worst]))


def test_the_recommended_budget_is_the_cheapest_that_is_good_enough() -> None:
    without, even = offer(10, 14), np.full(2, 0.5)
    assert recommended([offer(5, 5), offer(1, 1.3), offer(0.1, 0.1)], without, even) == 1
    # On the mean alone is not enough.
    assert recommended([offer(5, 5), offer(0.9, 1.5), offer(0.1, 0.1)], without, even) == 2
    # What is compared is the loss without extra bytes, and not that of the first budget asked for.
    assert recommended([offer(1, 1.4), offer(0.05, 0.1)], without, even) == 0
    assert recommended([offer(9, 12), offer(8, 11)], without, even) == 1
    # A tenant whom most requests name counts most.
    assert recommended([offer(1.0, 1.4), offer(0, 0)], without, np.array([0.0, 1.0])) == 0
    assert recommended([offer(1.0, 1.41), offer(0, 0)], without, np.array([0.0, 1.0])) == 1


def test_budgets_can_be_given_in_bytes_and_in_shares(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Store.open(store)
    fixed = max(opened.non_expert_bytes(n) for n in opened.tenants)
    budget = fixed + one_model(store) + 3 * opened.copy_bytes
    code, out, _ = run(capsys, store, "--budget", budget, "--extra", "10%", "--policy", "residual")
    assert code == 0 and "policy residual" in " ".join(out.split())
    body = rows(out)
    assert len(body) == 2
    used = [float(row[1 if row[0] == "->" else 0].rstrip("%")) for row in body]
    assert sorted(used)[0] <= 10 and 90 < max(used) <= 100
    short = fixed + one_model(store) - 1
    code, _, err = run(capsys, store, "--budget", short)
    assert (
        code == 1
        and "is less than one copy of each expert" in err
        and "leaves positions out" in err
    )


def test_a_picture(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    code, out, _ = run(capsys, store, "--plot", picture, "--extra", "0", "--extra", "0.5")
    assert code == 0 and "drawn:" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    for bad in (tmp_path / "loss.nothing", tmp_path / "absent" / "loss.png"):
        code, _, err = run(capsys, store, "--plot", bad, "--extra", "0")
        assert code == 1 and "the picture cannot be written" in err


def test_apply_plans_the_store_anew(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Store.open(store).plan
    code, out, _ = run(capsys, store)
    assert code == 0 and "this store now: policy round_robin, extra 0.0%" in " ".join(out.split())
    code, out, _ = run(capsys, store, "--extra", "30%", "--policy", "residual", "--apply")
    after = Store.open(store)
    assert code == 0 and after.plan != before and after.plan.policy == "residual"
    assert 0 < after.extra_bytes <= 0.3 * one_model(store)
    assert after.manifest.provenance["settings"]["extra"] == 0.3
    assert after.verify() == [] and "resident copies" in out
    # Without a budget, the recommended one.
    code, out, _ = run(capsys, store, "--apply")
    assert code == 0
    after = Store.open(store)
    share = re.search(r"recommended: --extra ([\d.]+)%", out)
    assert share is not None and after.plan.policy == "residual"
    assert 100 * after.extra_bytes / one_model(store) == pytest.approx(float(share[1]), abs=2)
    assert after.manifest.prediction is not None
    # What is predicted of what was built is near what the table said.
    stated = re.search(
        r"recommended: .*?predicted loss ([\d.e-]+) on the mean", " ".join(out.split())
    )
    assert stated is not None
    assert np.mean(after.manifest.prediction["losses"]) == pytest.approx(float(stated[1]), rel=0.5)


def test_a_budget_is_kept_as_it_was_asked_for(
    store: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not as the share of extra bytes that it left: with another tenant that would be another
    budget."""
    opened = Store.open(store)
    budget = (
        max(opened.non_expert_bytes(n) for n in opened.tenants)
        + one_model(store)
        + opened.copy_bytes
    )
    code, _, _ = run(capsys, store, "--budget", budget, "--policy", "residual", "--apply")
    settings = Store.open(store).manifest.provenance["settings"]
    assert code == 0 and (settings["budget_bytes"], settings["extra"], settings["slots"]) == (
        budget,
        None,
        None,
    )
    assert budget - 64 < Store.open(store).bytes_budget <= budget
    # A tenant with a wider vocabulary: its other weights take bytes of the budget that copies had.
    wide = helpers.random_mixtral(
        7,
        vocab_size=110,
        num_local_experts=3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    grown = add_tenant(store, "wide", helpers.save(wide, tmp_path / "wide"))
    assert grown.manifest.provenance["settings"] == settings
    assert grown.plan.num_slots < 4 and grown.bytes_budget <= budget


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{store}x"], 1, "no such directory"),
        (
            ["{store}", "--policy", "round_robin"],
            1,
            "'round_robin' has one plan for every budget .* choose one of: residual",
        ),
        (["{store}", "--policy", "best"], 2, "invalid choice"),
        (
            ["{store}", "--extra", "-1"],
            2,
            "give a share of one model's expert bytes, as 15% or 0.15",
        ),
        (
            ["{store}", "--extra", "15"],
            2,
            "'15' is 1500% of one model's expert bytes; write 15% or 0.15",
        ),
        (["{store}", "--extra", "nan"], 2, "give a share"),
        (["{store}", "--budget", "much"], 2, "much"),
        (["{store}", "--traffic", "eve=1"], 1, "traffic is given for 'eve'"),
        (["{store}", "--traffic", "ana=-1"], 1, "give a number above 0"),
        (["{store}", "--traffic", "ana"], 2, "write NAME=WEIGHT"),
        (["{store}", "--calibrate", "ana={store}/absent.jsonl"], 2, "absent.jsonl: cannot be read"),
        (["{store}", "--calibrate", "ana"], 2, "write NAME="),
    ],
)
def test_errors(
    arguments: list[str], code: int, message: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = run(capsys, *(a.replace("{store}", str(store)) for a in arguments))
    assert found == code and re.search(message, err), err
    assert "Traceback" not in err
