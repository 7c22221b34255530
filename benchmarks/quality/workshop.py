"""Every method on every material: what serves the tenants is built, run and scored."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import merging
from benchmarks.quality.methods import PLANNED, Method
from common import Store, build_store
from common.build.examples import CalibrationSet
from common.checkpoints import open_checkpoint
from common.planning.measurements import Measurements
from common.planning.planner import Planner
from common.planning.policies import DEFAULT_EXTRA
from common.progress import Progress, silent
from common.store.change import set_plan
from common.store.profiles import load_profile
from scripts.quality.measure import measure, measure_alone, result_of
from scripts.quality.scores import Result
from scripts.quality.task import DEFAULTS, Options, Task, TaskError, check_tasks
from scripts.store_views import alone_store


@dataclass(frozen=True)
class Material:
    """Tenants of one base with their tasks: what methods are compared on.

    tenants: name -> checkpoint, in the order that plans count them. base: what they were tuned
        from, for merging.
    calibration: examples for policies that measure before they plan; never those of the tasks.
    seed: of the tenants' training, or of whatever else makes this material differ from others of
        the same name.
    """

    tenants: Mapping[str, str | Path]
    tasks: Mapping[str, Task]
    base: str | Path | None = None
    calibration: Mapping[str, CalibrationSet] | None = None
    name: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_tasks(self.tasks, tuple(self.tenants))


class Workshop:
    """Builds what methods serve a material's tenants from. One store with all of them is planned
    anew for each policy.

    directory: an empty one, for stores and merged checkpoints. methods: those to come; the
    material's calibration is run if one of them looks at it.
    """

    def __init__(
        self,
        material: Material,
        directory: Path,
        methods: Sequence[Method] = (),
        progress: Progress = silent,
    ):
        self.material, self._directory, self._progress = material, directory, progress
        self._path = directory / "store"
        self._calibrates = any(m.calibrates for m in methods)
        self._planners: dict[bool, Planner] = {}
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """All tenants; planned by whatever method came last."""
        if self._store is None:
            self._store = build_store(
                self._path,
                self.material.tenants,
                policy="round_robin",
                calibration=self.material.calibration if self._calibrates else None,
                progress=self._progress,
            )
        return self._store

    def serve(self, method: Method) -> tuple[Store, dict[str, float] | None]:
        """A store in which every tenant is served as the method says; good until the next call.

        Beside it what the method's planner expects each tenant's divergence to be, if it has
        calibration and a policy.
        """
        method.check()
        recipe, material = method.recipe(), self.material
        if method.name == "alone":
            return alone_store(self.store, self.store.tenants), None
        if recipe is not None and method.name.endswith("_experts"):
            return merging.merge_experts(self.store.path, recipe, material.base), None
        if method.name in PLANNED:
            return self._planned(method)
        merged = self._directory / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        if recipe is not None:
            merging.merge(recipe, material.tenants, material.base, merged, progress=self._progress)
        elif method.name == "base":
            if material.base is None:
                raise TaskError(
                    "method 'base' needs the model that the tenants were tuned from; give it with "
                    "--base"
                )
            # An average of one: reads a checkpoint of any kind.
            merging.merge(merging.Recipe("average"), {"base": material.base}, None, merged)
        else:
            shared, _ = self._planned(Method("round_robin"))
            shared.export(shared.tenants[0], merged)
        return self._one_model(merged), None

    def _planned(self, method: Method) -> tuple[Store, dict[str, float] | None]:
        store, calibrated = self.store, bool(method.options.get("calibrated", True))
        if calibrated not in self._planners:
            profiles = (
                {n: p for n in store.tenants if (p := load_profile(store, n))} if calibrated else {}
            )
            known = Measurements.from_store(store)
            self._planners[calibrated] = Planner(
                store, profiles, progress=self._progress, known=known
            )
        policy, slots = PLANNED[method.name], method.options.get("slots")
        extra = method.extra
        if extra is None:  # as `moetel build` has it
            extra = (
                DEFAULT_EXTRA * len(store.tenants) if policy.uses_extra and slots is None else 0.0
            )
        extra_bytes = int(extra * store.experts.num_positions * store.copy_bytes)
        outcome = self._planners[calibrated].plan(method.name, slots, extra_bytes)
        expected = None
        if outcome.prediction.unit == "nats":
            expected = dict(zip(store.tenants, outcome.prediction.losses.tolist(), strict=True))
        return set_plan(
            store.path, outcome.plan, merged=outcome.merged, records=outcome.records
        ), expected

    def _one_model(self, merged: Path) -> Store:
        """A store in which each tenant has the weights of one checkpoint, and its own tokenizer."""
        folder, copies = self._directory / "one_model", {}
        for name, path in self.material.tenants.items():
            copies[name] = place = folder / name
            place.mkdir(parents=True)
            assets = {
                n: p
                for n, p in open_checkpoint(path).assets.items()
                if isinstance(p, Path) and n != "config.json"
            }
            for file in merged.iterdir():
                if file.name == "config.json" or ".safetensors" in file.name:
                    assets[file.name] = file
            for file_name, source in assets.items():
                (place / file_name).symlink_to(source.resolve())
        try:
            return build_store(self._directory / "one_model_store", copies, policy="round_robin")
        finally:
            shutil.rmtree(folder)


def evaluate(
    materials: Sequence[Material],
    methods: Sequence[Method],
    options: Options = DEFAULTS,
    on_result: Callable[[Result], None] = lambda result: None,
    progress: Progress = silent,
) -> list[Result]:
    """Every method on every material, each tenant alone first. Stores are built in the scratch
    folder, one at a time.

    on_result: called with each result as it comes.
    """
    results = []

    def add(result: Result) -> None:
        results.append(result)
        on_result(result)

    for material in materials:
        with tempfile.TemporaryDirectory(dir=options.scratch, prefix="moetel-eval-") as scratch:
            folder = Path(scratch)
            begun = time.perf_counter()
            workshop = Workshop(material, folder, methods, progress)
            store, _ = workshop.serve(Method("alone"))
            built = time.perf_counter()
            own = measure_alone(store, material.tasks, options, folder, progress)
            scores = {name: alone.scores for name, alone in own.items()}
            add(
                result_of(
                    Method("alone").label,
                    (material.name, material.seed),
                    store,
                    scores,
                    begun,
                    built,
                )
            )
            for method in methods:
                if method.name == "alone":
                    continue
                begun = time.perf_counter()
                store, expected = workshop.serve(method)
                built = time.perf_counter()
                scores = measure(store, own, options, progress)
                add(
                    result_of(
                        method.label,
                        (material.name, material.seed),
                        store,
                        scores,
                        begun,
                        built,
                        expected,
                    )
                )
    return results
