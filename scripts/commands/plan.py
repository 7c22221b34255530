"""Compare what budgets buy: bytes and predicted loss of a store's tenants, as table and picture;
--apply plans anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from common import EngineError, PlanError, Store
from common.build.build import replan
from common.build.calibration import calibrate
from common.planning.measurements import Measurements
from common.planning.planner import Planner
from common.planning.policies import DEFAULT_POLICY, POLICIES
from common.progress import Progress, bars, silent
from common.store.profiles import load_profile
from common.units import format_bytes
from scripts import arguments
from scripts.commands import build

# Shares of one model's expert bytes beyond one copy of each, where no budgets are given.
EXTRAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0)
# A budget is recommended if it leaves no more than this of what sharing costs without extra bytes.
ENOUGH = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument(
        "--policy", choices=POLICIES, default=DEFAULT_POLICY, help="default: %(default)s"
    )
    parser.add_argument(
        "--budget",
        type=arguments.size,
        action="append",
        default=[],
        help="device bytes, as 60GiB; repeat to compare",
    )
    parser.add_argument(
        "--extra",
        type=arguments.share,
        action="append",
        default=[],
        help="or a share of one model's expert bytes, as 15%%",
    )
    arguments.add_plan_arguments(parser)
    parser.add_argument(
        "--plot", type=arguments.path, metavar="FILE.png", help="draw predicted loss against bytes"
    )
    parser.add_argument(
        "--apply",
        action="store_true",
        help="plan the store anew with the one budget given, else the recommended one",
    )


@dataclass(frozen=True)
class Asked:
    """A budget as it was asked for, and so as a store keeps it: device bytes, or a share of one
    model's experts'."""

    budget_bytes: int | None = None
    extra: float | None = None

    def extra_bytes(self, store: Store) -> int:
        """Bytes beyond one copy of each position; as `build_store` reckons, so that --apply plans
        what was shown."""
        one_model = store.experts.num_positions * store.copy_bytes
        if self.budget_bytes is None:
            return int((self.extra or 0.0) * one_model)
        return (
            self.budget_bytes
            - max(store.non_expert_bytes(name) for name in store.tenants)
            - one_model
        )


@dataclass(frozen=True)
class Offer:
    """What a budget buys. extra: share of one model's expert bytes used beyond one copy of each
    position.
    nbytes: device bytes with one tenant's other weights. losses: float64 [tenants], predicted."""

    asked: Asked
    extra: float
    nbytes: int
    losses: np.ndarray


def offers(store: Store, planner: Planner, policy: str, budgets: Sequence[Asked]) -> list[Offer]:
    """Predicted, not built: what residuals leave is estimated from singular values."""
    one_model = store.experts.num_positions * store.copy_bytes
    fixed = max(store.non_expert_bytes(name) for name in store.tenants)
    allocator = planner.allocator(policy)
    found = []
    for asked in budgets:
        allocation = allocator.allocate(one_model + asked.extra_bytes(store))
        found.append(
            Offer(
                asked,
                allocation.nbytes / one_model - 1,
                allocation.nbytes + fixed,
                allocation.losses.sum(axis=0),
            )
        )
    return found


def recommended(found: Sequence[Offer], without: Offer, traffic: np.ndarray) -> int:
    """The cheapest that leaves at most a tenth of the loss without extra bytes, on the mean and for
    the worst tenant; the last one if none does."""
    mean, worst = (ENOUGH * float(v) for v in (without.losses @ traffic, without.losses.max()))
    for i, offer in enumerate(found):
        if offer.losses @ traffic <= mean and offer.losses.max() <= worst:
            return i
    return len(found) - 1


def mean_name(traffic: np.ndarray) -> str:
    """What the mean over tenants is called. traffic: float64 [tenants], summing to 1."""
    return "mean" if np.allclose(traffic, traffic[0]) else "mean by traffic"


def table(
    store: Store, found: Sequence[Offer], best: int, unit: str, policy: str, traffic: np.ndarray
) -> Table:
    made = Table(
        title=f"{store.path}: policy {policy}, predicted loss in {unit}", title_justify="left"
    )
    for column in ("", "extra", "experts and one tenant", mean_name(traffic), "worst"):
        made.add_column(column, justify="right")
    for name in store.tenants:
        made.add_column(name, justify="right")
    for i, offer in enumerate(found):
        made.add_row(
            "->" if i == best else "",
            f"{offer.extra:.1%}",
            format_bytes(offer.nbytes),
            f"{offer.losses @ traffic:.4g}",
            f"{offer.losses.max():.4g}",
            *(f"{loss:.3g}" for loss in offer.losses),
        )
    return made


def as_built(store: Store, traffic: np.ndarray) -> str | None:
    """The plan that the store has, beside what the table offers; None where no loss of it is known
    for a tenant."""
    prediction = store.manifest.prediction
    if prediction is None or any(loss is None for loss in prediction["losses"]):
        return None
    losses, about = np.array(prediction["losses"]), store.describe()
    extra = about["extra_bytes"] / (about["positions"] * about["copy_bytes"])
    return (
        f"this store now: policy {store.plan.policy}, extra {extra:.1%}, "
        f"{format_bytes(about['bytes_budget'])}, "
        f"predicted loss {losses @ traffic:.4g} on the {mean_name(traffic)}, {losses.max():.4g} "
        "for the worst tenant, "
        f"in {prediction['unit']}; of the weights that it keeps, where the table estimates what "
        "residuals will be worth"
    )


def draw(
    store: Store, found: Sequence[Offer], best: int, unit: str, path: Path, traffic: np.ndarray
) -> None:
    """Predicted loss of each tenant and their mean against bytes."""
    try:
        import matplotlib
    except ImportError as error:
        raise EngineError("--plot needs matplotlib; run: pip install 'moetel[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    extra = [100 * o.extra for o in found]
    for t, name in enumerate(store.tenants):
        axes.plot(extra, [o.losses[t] for o in found], linewidth=0.9, marker=".", label=name)
    mean = [float(o.losses @ traffic) for o in found]
    axes.plot(extra, mean, color="black", linewidth=2.2, label=mean_name(traffic))
    axes.axvline(extra[best], color="black", linestyle=":", linewidth=1, label="recommended")
    if min(o.losses.min() for o in found) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("device memory beyond one model's experts, % of these")
    axes.set_ylabel(f"predicted loss a token, {unit}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{path}: the picture cannot be written ({error}); give a file name that ends in .png"
        ) from error
    finally:
        pyplot.close(figure)


def planner_for(store: Store, args: argparse.Namespace, progress: Progress = silent) -> Planner:
    """A planner with what the store knows of its tenants and what is measured now, which is nothing
    where the store was planned with the same calibration and traffic."""
    profiles = {name: p for name in store.tenants if (p := load_profile(store, name))}
    if args.calibrate:
        profiles |= calibrate(store, dict(args.calibrate), progress=progress)
    traffic = dict(args.traffic) or store.manifest.provenance["settings"].get("traffic", {})
    return Planner(store, profiles, traffic, progress, Measurements.from_store(store))


def run(args: argparse.Namespace) -> int:
    store = Store.open(args.store)
    one_model = store.experts.num_positions * store.copy_bytes
    fixed = max(store.non_expert_bytes(name) for name in store.tenants)
    if not POLICIES[args.policy].uses_extra:
        raise PlanError(
            f"policy {args.policy!r} has one plan for every budget from one copy a position on; "
            "choose one of: " + ", ".join(n for n, p in POLICIES.items() if p.uses_extra)
        )
    asked = [Asked(extra=share) for share in args.extra] + [
        Asked(budget_bytes=b) for b in args.budget
    ]
    short = [b for b in args.budget if b < fixed + one_model]
    if short:
        raise PlanError(
            f"budget of {format_bytes(short[0])} is less than one copy of each expert and one "
            "tenant's other weights "
            f"take ({format_bytes(fixed + one_model)}); `moetel build --budget` leaves positions "
            "out"
        )
    planner = planner_for(store, args, bars)
    if not asked:
        most = len(store.tenants) - 1
        asked = [
            Asked(extra=float(share)) for share in sorted({min(most, share) for share in EXTRAS})
        ]
    asked.sort(key=lambda a: a.extra_bytes(store))
    without, *found = offers(store, planner, args.policy, [Asked(extra=0.0), *asked])
    best = recommended(found, without, planner.traffic)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table(store, found, best, planner.unit, args.policy, planner.traffic))
    if planner.unit == "squared distance":
        console.print(
            "no tenant is calibrated: distances of weights stand in; give --calibrate NAME=FILE "
            "for nats"
        )
    now = as_built(store, planner.traffic)
    if now:
        console.print(now)
    offer = found[best]
    console.print(
        f"recommended: --extra {offer.extra:.1%} ({format_bytes(offer.nbytes)} with one tenant's "
        "other weights), "
        f"predicted loss {offer.losses @ planner.traffic:.4g} on the {mean_name(planner.traffic)}, "
        f"{offer.losses.max():.4g} for the worst tenant: the cheapest of these that leaves at most "
        "a tenth of the loss "
        "without extra bytes, else the last"
    )
    if args.plot:
        draw(store, found, best, planner.unit, args.plot, planner.traffic)
        console.print(f"drawn: {args.plot}")
    if args.apply:
        done = replan(
            args.store,
            policy=args.policy,
            budget_bytes=offer.asked.budget_bytes,
            extra=offer.asked.extra,
            calibration={name: planner.profiles[name] for name in dict(args.calibrate)},
            traffic=dict(args.traffic) or None,
            known=planner.measurements,
            progress=bars,
        )
        build.report(done, console)
    return 0
