"""What is left of each tenant's quality when it is served by some method, beside the tenant running
alone.

A `Material` is tenants with tasks; a `Method` is a way to serve them from less memory; `evaluate`
runs every method on every material through Moetel's engines and gives `Result`s. `moetel eval`
is the command, `scripts.quality.report` makes tables and plots. Logits are held for a few rows at a
time; a tenant's own, which each method is compared with, are kept on disk.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.quality import merging
from common import (
    EngineError,
    MoetelError,
    SamplingParams,
    Store,
    UnknownTenantError,
    build_store,
    load_engine,
)
from common.calibration import CalibrationSet, Profile, divergence, json_fault, refused_pair
from common.checkpoints import open_checkpoint
from common.consolidation import plan_all
from common.engine import Engine, Prompt
from common.policies import DEFAULT_EXTRA, POLICIES, Planner
from common.progress import Progress, silent
from common.store import set_plan
from common.store.measurements import Measurements

# Tenants up to this many bytes run alone side by side in one engine; larger ones one after another.
SIDE_BY_SIDE_BYTES = 4 << 30

# Positions compared at once, so that float64 copies of their logits stay small.
CHUNK = 64

Metric = Literal["auto", "exact_match", "rouge1", "rougeL", "perplexity"]
METRICS = ("auto", "exact_match", "rouge1", "rougeL", "perplexity")


class TaskError(MoetelError):
    """A task file that cannot be used, or a method that cannot be applied."""


# What is asked.


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that counts as right if there is one: text or token ids."""

    prompt: Prompt
    answer: Prompt | None = None


@dataclass(frozen=True)
class Task:
    """What a tenant is judged by. source: where it comes from, for errors."""

    questions: tuple[Question, ...] = ()
    texts: tuple[Prompt, ...] = ()
    source: str = "task"

    @classmethod
    def read(cls, path: str | Path, limit: int | None = None) -> Task:
        """A JSONL file; `limit` lines of each kind at most. Raises TaskError that names file and
        line."""
        path = Path(path)
        try:
            # Not splitlines(): a JSON string may hold characters that it takes for the end of a
            # line.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{path}: cannot be read: {error}") from error
        questions: list[Question] = []
        texts: list[Prompt] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise TaskError(
                    f"{where}: not JSON ({json_fault(error)}); write one object a line"
                ) from error
            if not isinstance(value, dict) or not ({"prompt", "text"} & set(value)):
                raise TaskError(
                    f'{where}: expected {{"prompt": ..., "answer": ...}} or {{"text": ...}}, found '
                    f"{line[:60]!r}"
                )
            pair = refused_pair(value)
            if pair is not None:
                raise TaskError(f"{where}: {pair}")
            if "text" in value:
                texts.append(_words(value["text"], f"{where}: text"))
            else:
                answer = value.get("answer")
                questions.append(
                    Question(
                        _words(value["prompt"], f"{where}: prompt"),
                        None if answer is None else _words(answer, f"{where}: answer"),
                    )
                )
        if not questions and not texts:
            raise TaskError(f"{path}: no line in it; write at least one prompt or text")
        return cls(tuple(questions[:limit]), tuple(texts[:limit]), str(path))


def _words(value: Any, what: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(i) is int for i in value):
        return tuple(value)
    raise TaskError(
        f"{what} is {str(value)[:60]!r}; write a text that is not empty, or a list of token ids"
    )


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
        _check_tasks(self.tasks, tuple(self.tenants))


def _check_tasks(tasks: Mapping[str, Task], tenants: tuple[str, ...]) -> None:
    for name in tasks:
        if name not in tenants:
            raise UnknownTenantError(name, tenants)
    if not tasks:
        raise TaskError(
            "no task: give each tenant that is to be judged one, as --task NAME=FILE.jsonl"
        )


@dataclass(frozen=True)
class Options:
    """How to measure.

    window, stride: perplexity feeds at most `window` tokens at once and scores `stride` new ones
        with each (all but the first `window`, which are scored whole); every token but a text's
        first is scored once. None: the smaller of 512 and the tenant's context; stride: the window.
    max_new_tokens: longest answer. forced: which answer the distributions are compared along: the
        tenant's own greedy one when it stands alone, or the given one.
    positions: most positions of a tenant that distributions are compared at, evenly spread; the
        tenant's own logits at these are kept on disk, 4 bytes * vocabulary each.
    logits_bytes: most bytes of logits in memory at once, one row of tokens at least.
    metric: what "kept" compares; auto: exact match, if the tenant alone has any, else ROUGE-1, else
        perplexity.
    scratch: folder for stores and logits, emptied again; None: the system's.
    """

    window: int | None = None
    stride: int | None = None
    max_new_tokens: int = 128
    forced: Literal["own", "given"] = "own"
    positions: int = 4096
    logits_bytes: int = 1 << 28
    metric: Metric = "auto"
    device: str = "auto"
    dtype: str = "auto"
    scratch: Path | None = None

    def __post_init__(self) -> None:
        for name in ("window", "stride", "max_new_tokens", "positions"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise TaskError(f"{name} is {value!r}; give a whole number from 1")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise TaskError(
                f"stride {self.stride} is longer than window {self.window}: tokens would be left "
                "out"
            )


DEFAULTS = Options()


# What is found.


@dataclass(frozen=True)
class Scores:
    """One tenant under one method; None where the task has nothing of the kind.

    exact_match, rouge1, rougeL: 0..1, mean over the questions with an answer; ROUGE's are
        F-measures.
    perplexity: a token; word_perplexity: a word (run of non-space); bits_per_byte: of UTF-8.
    kl: mean over positions of KL(alone || served), nats a token. top1: share of positions where
        both have the same most probable token.
    questions, tokens, positions: how many each is the mean of.
    kept: the chosen metric beside the tenant alone: served / alone; of perplexities alone / served.
    """

    exact_match: float | None = None
    rouge1: float | None = None
    rougeL: float | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    kl: float | None = None
    top1: float | None = None
    questions: int = 0
    tokens: int = 0
    positions: int = 0
    kept: float | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Memory:
    """Device bytes. experts: the pool; residuals: all tenants'; other: one tenant's (the largest)
    other layers.

    share: (experts + residuals) / experts of one model.
    """

    experts: int
    residuals: int
    other: int
    extra: int
    share: float

    @classmethod
    def of(cls, store: Store) -> Memory:
        pool = store.plan.num_slots * store.copy_bytes
        one_model = store.experts.num_positions * store.copy_bytes
        return cls(
            pool,
            store.residual_bytes,
            store.bytes_budget - pool - store.residual_bytes,
            store.extra_bytes,
            (pool + store.residual_bytes) / one_model,
        )


@dataclass(frozen=True)
class Result:
    """One method on one material.

    built_s, scored_s: seconds. expected: tenant -> divergence in nats a token that the policy's
        planner predicted.
    """

    method: str
    material: str
    seed: int
    memory: Memory
    tenants: Mapping[str, Scores]
    built_s: float
    scored_s: float
    expected: Mapping[str, float] | None = None

    def mean(self, name: str) -> float | None:
        """Mean of one of `Scores`' fields over the tenants that have it."""
        found = self._values(name)
        return sum(found) / len(found) if found else None

    def worst(self, name: str) -> float | None:
        """The worst tenant's: the largest where less is better."""
        found = self._values(name)
        if not found:
            return None
        return (
            max(found)
            if name in ("perplexity", "word_perplexity", "bits_per_byte", "kl")
            else min(found)
        )

    def worst_tenant(self) -> str | None:
        """The tenant that keeps least; None if all keep the same."""
        found = {n: s.kept for n, s in self.tenants.items() if s.kept is not None}
        return min(found, key=lambda n: found[n]) if len(set(found.values())) > 1 else None

    def _values(self, name: str) -> list[float]:
        return [v for s in self.tenants.values() if (v := getattr(s, name)) is not None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"worst_tenant": self.worst_tenant()}


# Methods.


@dataclass(frozen=True)
class Method:
    """A way to serve the tenants. Written NAME[@EXTRA][:option=value,...].

    extra: for policies: memory beyond one model's experts, as a share of them; None: what `moetel
        build` takes.
    options: of `merging.Recipe` for merging methods; for policies slots, and calibrated (0: from
        weights alone).
    """

    name: str
    extra: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Raises TaskError for a name that is not known and a value that is no number."""
        match = re.fullmatch(r"(?P<name>\w+)(?:@(?P<extra>[^:]+))?(?::(?P<options>.+))?", text)
        if not match:
            raise TaskError(f"method {text!r}: write NAME, NAME@EXTRA or NAME:option=value,...")
        if match["name"] not in names():
            raise TaskError(f"no method {match['name']!r}; there is: {', '.join(names())}")
        options: dict[str, Any] = {}
        for part in (match["options"] or "").split(",") if match["options"] else ():
            key, equals, value = part.partition("=")
            if not equals:
                raise TaskError(
                    f"method {text!r}: option {part!r} has no value; write option=value"
                )
            options[key] = (
                value if value == "all" else _number(value, f"method {text!r}: option {key}")
            )
        extra = (
            None
            if match["extra"] is None
            else float(_number(match["extra"], f"method {text!r}: extra"))
        )
        found = cls(match["name"], extra, options)
        found.check()
        return found

    @property
    def label(self) -> str:
        """For tables: `auto + 15 %`, `ties, density 0.2`."""
        text = self.name.replace("_", " ")
        if self.extra is not None:
            text += f" + {100 * self.extra:.4g} %"
        return ", ".join([text, *(f"{k} {v}" for k, v in self.options.items())])

    def recipe(self) -> merging.Recipe | None:
        """How to merge, None for methods that do not."""
        name = self.name.removesuffix("_experts")
        return merging.Recipe.of(name, self.options) if name in merging.METHODS else None

    @property
    def calibrates(self) -> bool:
        """Whether the plan depends on calibration, where there is one."""
        return (
            self.name in POLICIES
            and self.name != "round_robin"
            and bool(self.options.get("calibrated", True))
        )

    def check(self) -> None:
        """Raises TaskError or PlanError for options that the method does not take."""
        if self.name in POLICIES:
            known: tuple[str, ...] = ("slots", "calibrated")
        elif self.recipe() is not None:
            known = tuple(self.options)  # checked by the recipe
        else:
            known = ()
        for option in self.options:
            if option not in known:
                raise TaskError(
                    f"method {self.name!r} has no option {option!r}; it has: "
                    f"{', '.join(known) or 'none'}"
                )
        if self.extra is not None and (
            self.name not in POLICIES or (self.extra and not POLICIES[self.name].uses_extra)
        ):
            users = ", ".join(name for name, policy in POLICIES.items() if policy.uses_extra)
            raise TaskError(
                f"method {self.name!r} has no use for extra memory; leave @ out, or take one of: "
                f"{users}"
            )


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
        if method.name in POLICIES:
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
                {n: p for n in store.tenants if (p := Profile.from_store(store, n))}
                if calibrated
                else {}
            )
            known = Measurements.from_store(store)
            self._planners[calibrated] = Planner(
                store, profiles, progress=self._progress, known=known
            )
        policy, slots = POLICIES[method.name], method.options.get("slots")
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


def names() -> tuple[str, ...]:
    """Every method that `Method.parse` knows; policies are those of `moetel build`."""
    return (
        "alone",
        "base",
        *POLICIES,
        "round_robin_one_model",
        *merging.METHODS,
        *(f"{m}_experts" for m in merging.METHODS),
    )


def usual_methods(extra: Sequence[float], with_base: bool) -> list[Method]:
    """The paper's rule, the merging baselines, and every other policy: without extra memory, and
    with each share of it where the policy has a use for it.

    Policies with residuals are what the policy without is, if they have no extra memory: left out.
    """
    found = [Method("round_robin"), Method("round_robin_one_model")]
    found += [Method(m) for m in merging.METHODS if with_base or m not in merging.NEED_BASE]
    for name, policy in POLICIES.items():
        if name != "round_robin" and not policy.kinds.any:
            found.append(Method(name, 0.0 if policy.uses_extra else None))
        if policy.uses_extra:
            found += [Method(name, share) for share in extra or (None,)]
    return found


def _number(text: str, what: str) -> float | int:
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise TaskError(f"{what} is {text!r}; give a number") from None


# Measuring.


@dataclass(frozen=True)
class _Row:
    """Token ids to feed, and what is judged: `targets` at the positions from `start` on.

    decoder_ids: for encoder-decoder families; positions are then the decoder's. scored: targets
        count for perplexity.
    offset: where the own logits of these positions lie among those on disk; None: not compared.
    """

    ids: tuple[int, ...]
    decoder_ids: tuple[int, ...] | None
    start: int
    targets: tuple[int, ...]
    scored: bool
    offset: int | None = None


@dataclass(frozen=True)
class Own:
    """A tenant alone: its rows, its scores, and its logits on disk, float32 [positions, vocab]."""

    tenant: str
    task: Task
    prompts: tuple[tuple[int, ...], ...]
    rows: tuple[_Row, ...]
    scores: Scores
    words: int
    text_bytes: int
    logits: np.ndarray | None


def alone_store(store: Store, tenants: Sequence[str]) -> Store:
    """The same store as if it held these tenants alone, all their own experts resident; identical
    ones once.

    Nothing is written.
    """
    spec, family = store.experts, store.family
    numbers: dict[tuple[str, ...], int] = {}
    contents = np.zeros((len(tenants), spec.num_layers, spec.num_experts), dtype=np.int64)
    for t, name in enumerate(tenants):
        tenant = store.tenant(name)
        for layer, expert in np.ndindex(spec.num_layers, spec.num_experts):
            ids = tuple(
                tenant.tensors[family.expert_tensor(tenant.config, layer, expert, p)]
                for p, _ in spec.projections
            )
            contents[t, layer, expert] = numbers.setdefault(ids, len(numbers))
    kept = tuple(store.tenant(name) for name in tenants)
    plan = plan_all(contents, tenants)
    return Store(
        store.path, replace(store.manifest, tenants=kept, plan=plan, merged={}, residuals=())
    )


def measure_alone(
    store: Store,
    tasks: Mapping[str, Task],
    options: Options,
    directory: Path,
    progress: Progress = silent,
) -> dict[str, Own]:
    """Run each tenant that has a task with its own experts. directory: takes the logits.

    Raises TaskError, RequestError that name the tenant.
    """
    _check_tasks(tasks, store.tenants)
    together = store.bytes_before <= SIDE_BY_SIDE_BYTES
    groups = [list(tasks)] if together else [[name] for name in tasks]
    found = {}
    with progress("each tenant alone", len(tasks)) as advance:
        for group in groups:
            with load_engine(
                alone_store(store, group), device=options.device, dtype=options.dtype
            ) as engine:
                for name in group:
                    found[name] = _alone(
                        engine, name, tasks[name], options, directory / f"{name}.logits"
                    )
                    advance()
    return found


def measure(
    store: Store, own: Mapping[str, Own], options: Options, progress: Progress = silent
) -> dict[str, Scores]:
    """The same tenants as the store serves them, beside what they are alone."""
    found = {}
    with (
        load_engine(store, device=options.device, dtype=options.dtype) as engine,
        progress("served", len(own)) as advance,
    ):
        for name, alone in own.items():
            found[name] = _served(engine, alone, options)
            advance()
    return found


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
            add(_result(Method("alone").label, material, store, scores, begun, built))
            for method in methods:
                if method.name == "alone":
                    continue
                begun = time.perf_counter()
                store, expected = workshop.serve(method)
                built = time.perf_counter()
                scores = measure(store, own, options, progress)
                add(_result(method.label, material, store, scores, begun, built, expected))
    return results


def evaluate_store(
    store: Store,
    tasks: Mapping[str, Task],
    options: Options = DEFAULTS,
    on_result: Callable[[Result], None] = lambda result: None,
    progress: Progress = silent,
) -> list[Result]:
    """A store as it is, beside each of its tenants alone."""
    material = Material(dict.fromkeys(store.tenants, store.path), tasks, name=store.path.name)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="moetel-eval-") as scratch:
        begun = time.perf_counter()
        own = measure_alone(store, tasks, options, Path(scratch), progress)
        scores = {name: alone.scores for name, alone in own.items()}
        every = alone_store(store, store.tenants)
        results = [_result(Method("alone").label, material, every, scores, begun, begun)]
        on_result(results[0])
        begun = time.perf_counter()
        scores = measure(store, own, options, progress)
        results.append(
            _result(store.plan.policy.replace("_", " "), material, store, scores, begun, begun)
        )
        on_result(results[1])
    return results


def _result(
    label: str,
    material: Material,
    store: Store,
    scores: Mapping[str, Scores],
    begun: float,
    built: float,
    expected: Mapping[str, float] | None = None,
) -> Result:
    now = time.perf_counter()
    seconds = round(built - begun, 2), round(now - built, 2)
    return Result(
        label, material.name, material.seed, Memory.of(store), dict(scores), *seconds, expected
    )


def _alone(engine: Engine, tenant: str, task: Task, options: Options, file: Path) -> Own:
    config = engine.store.config(tenant)
    if task.texts and config.is_encoder_decoder:
        raise TaskError(
            f"{task.source}: tenant {tenant!r} is an encoder-decoder, which continues no plain "
            "text; write its task as "
            "prompts and answers"
        )
    prompts = tuple(_token_ids(engine, tenant, q.prompt) for q in task.questions)
    answers, scores = _answer(engine, tenant, task, prompts, options)
    texts = [_token_ids(engine, tenant, text) for text in task.texts]
    window = options.window or min(512, config.max_positions)
    if window > config.max_positions:
        raise TaskError(
            f"window {window} is longer than the context of tenant {tenant!r} "
            f"({config.max_positions})"
        )
    rows = [row for ids in texts for row in _text_rows(ids, window, options.stride or window)]
    for question, prompt, answer in zip(task.questions, prompts, answers, strict=True):
        if options.forced == "given" and question.answer is not None:
            given = question.answer
            answer = tuple(engine.answer_ids(tenant, given) if isinstance(given, str) else given)
        rows.append(_question_row(engine, tenant, prompt, answer))
    rows = _spread([row for row in rows if row.targets], options.positions)
    if not rows:
        raise TaskError(
            f"{task.source}: nothing to score for tenant {tenant!r}: its texts hold one token at "
            "most"
        )
    positions = sum(len(r.targets) for r in rows if r.offset is not None)
    own = Own(
        tenant,
        task,
        prompts,
        tuple(rows),
        scores,
        sum(len(t.split()) for t in task.texts if isinstance(t, str)),
        sum(len(t.encode()) for t in task.texts if isinstance(t, str)),
        None,
    )
    with open(file, "wb") as out:
        scores = _forced(engine, own, options, lambda row, values: values.tofile(out))
    stored = (
        np.memmap(file, dtype=np.float32, mode="r", shape=(positions, config.vocab_size))
        if positions
        else None
    )
    scores = replace(
        scores, kl=0.0 if positions else None, top1=1.0 if positions else None, positions=positions
    )
    return replace(own, scores=_with_kept(scores, scores, options.metric, tenant), logits=stored)


def _served(engine: Engine, own: Own, options: Options) -> Scores:
    _, scores = _answer(engine, own.tenant, own.task, own.prompts, options)
    total, same, positions = 0.0, 0, 0

    def compare(row: _Row, values: np.ndarray) -> None:
        nonlocal total, same, positions
        assert own.logits is not None and row.offset is not None
        mine = own.logits[row.offset : row.offset + len(values)]
        if mine.shape != values.shape:
            raise TaskError(
                f"tenant {own.tenant!r} has a vocabulary of {mine.shape[1]} alone and "
                f"{values.shape[1]} as served"
            )
        for i in range(0, len(values), CHUNK):
            total += float(divergence(mine[i : i + CHUNK], values[i : i + CHUNK]).sum())
        same += int((mine.argmax(-1) == values.argmax(-1)).sum())
        positions += len(values)

    scores = _forced(engine, replace(own, scores=scores), options, compare)
    if positions:
        scores = replace(
            scores, kl=max(0.0, total / positions), top1=same / positions, positions=positions
        )
    return _with_kept(scores, own.scores, options.metric, own.tenant)


def _token_ids(engine: Engine, tenant: str, text: Prompt) -> tuple[int, ...]:
    return tuple(engine.tokenize(tenant, text) if isinstance(text, str) else text)


def _answer(
    engine: Engine, tenant: str, task: Task, prompts: Sequence[tuple[int, ...]], options: Options
) -> tuple[list[tuple[int, ...]], Scores]:
    """Greedy answers to all questions as token ids, and how right they are."""
    if not prompts:
        return [], Scores()
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    found = engine.generate_batch([(tenant, prompt) for prompt in prompts], params)
    right: list[float] = []
    pairs: list[tuple[str, str]] = []
    for question, out in zip(task.questions, found, strict=True):
        if isinstance(question.answer, str):
            if out.text is None:
                raise TaskError(
                    f"{task.source}: tenant {tenant!r} has no tokenizer; write answers as token ids"
                )
            right.append(float(out.text.strip() == question.answer.strip()))
            pairs.append((question.answer, out.text))
        elif question.answer is not None:
            # The end-of-sequence token, if the tenant wrote one, is no part of an answer.
            got = out.token_ids[:-1] if out.finish_reason == "stop" else out.token_ids
            right.append(float(tuple(got) == tuple(question.answer)))
    scores = Scores(questions=len(right))
    if right:
        scores = replace(scores, exact_match=sum(right) / len(right))
    if pairs:
        rouge1, rouge_l = rouge(pairs)
        scores = replace(scores, rouge1=rouge1, rougeL=rouge_l)
    return [out.token_ids for out in found], scores


class _Words:
    """Splits as rouge-score's own tokenizer does, but at what is no letter or digit of any
    script."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge(pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Mean F-measures of ROUGE-1 and ROUGE-L over (expected, found), no stemming. Raises
    EngineError without the package."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EngineError("ROUGE needs rouge-score; run: pip install 'moetel[eval]'") from error
    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=_Words())
    found = [scorer.score(expected, answer) for expected, answer in pairs]
    one, longest = (
        sum(f[kind].fmeasure for f in found) / len(found) for kind in ("rouge1", "rougeL")
    )
    return float(one), float(longest)


def _text_rows(ids: tuple[int, ...], window: int, stride: int) -> Iterator[_Row]:
    """Windows over a text. Each token but the first is judged once, by all that goes before it in
    its window."""
    begin = 1
    while begin < len(ids):
        end = min(len(ids), begin + (window if begin == 1 else stride))
        first = max(0, end - 1 - window)
        yield _Row(ids[first : end - 1], None, begin - 1 - first, ids[begin:end], scored=True)
        begin = end


def _question_row(
    engine: Engine, tenant: str, prompt: tuple[int, ...], answer: tuple[int, ...]
) -> _Row:
    """The answer behind its prompt, judged at the answer's tokens; cut at the tenant's context."""
    config = engine.store.config(tenant)
    if config.is_encoder_decoder:
        answer = answer[: config.max_positions]
        decoder_ids = (engine.start_id(tenant), *answer[:-1])
        return _Row(prompt, decoder_ids, 0, answer, scored=False)
    answer = answer[: config.max_positions + 1 - len(prompt)]
    return _Row((*prompt, *answer[:-1]), None, len(prompt) - 1, answer, scored=False)


def _spread(rows: Sequence[_Row], limit: int) -> list[_Row]:
    """Number the positions to compare: every row, or every k-th if that would be more positions
    than `limit`.

    Rows that are neither scored nor compared are left out.
    """
    step = max(1, -(-sum(len(r.targets) for r in rows) // limit))
    out, offset = [], 0
    for i, row in enumerate(rows):
        if i % step == 0:
            out.append(replace(row, offset=offset))
            offset += len(row.targets)
        elif row.scored:
            out.append(row)
    return out


def _forced(
    engine: Engine, own: Own, options: Options, on_compared: Callable[[_Row, np.ndarray], None]
) -> Scores:
    """Run the rows; perplexity from those that are scored, `on_compared` for those that are
    compared, in order."""
    total, tokens = 0.0, 0
    for row, values in _logits(engine, own.tenant, own.rows, options):
        if row.scored:
            for i in range(0, len(values), CHUNK):
                total += _negative_log_likelihood(values[i : i + CHUNK], row.targets[i : i + CHUNK])
            tokens += len(row.targets)
        if row.offset is not None:
            on_compared(row, values)
    if not tokens:
        return own.scores
    return replace(
        own.scores,
        perplexity=_exp(total / tokens),
        word_perplexity=_exp(total / own.words) if own.words else None,
        bits_per_byte=total / math.log(2) / own.text_bytes if own.text_bytes else None,
        tokens=tokens,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _negative_log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Sum over positions, nats. logits: float32 [positions, vocab]."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=-1)
    normaliser = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=-1))
    return float((normaliser - wide[np.arange(len(targets)), list(targets)]).sum())


def _logits(
    engine: Engine, tenant: str, rows: Sequence[_Row], options: Options
) -> Iterator[tuple[_Row, np.ndarray]]:
    """Each row with its judged logits, float32 [targets, vocab]."""
    vocab = engine.store.config(tenant).vocab_size
    longest = max(len(r.ids if r.decoder_ids is None else r.decoder_ids) for r in rows)
    # The engine holds what it found and a padded copy of it.
    size = max(1, min(engine.max_batch_size, options.logits_bytes // (8 * longest * vocab)))
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        decoder = [list(r.decoder_ids) for r in part if r.decoder_ids is not None]
        found = engine.logits(tenant, [list(r.ids) for r in part], decoder or None)
        for row, values in zip(part, found, strict=True):
            yield row, np.ascontiguousarray(values[row.start : row.start + len(row.targets)])


def _with_kept(scores: Scores, alone: Scores, metric: Metric, tenant: str) -> Scores:
    """Add what is kept of the tenant's own score by the metric."""
    name: str | None = metric
    if metric == "auto":
        usable = [m for m in ("exact_match", "rouge1", "perplexity") if getattr(alone, m)]
        name = usable[0] if usable else None
    elif getattr(alone, metric) is None:
        raise TaskError(
            f"the task of tenant {tenant!r} has no {metric}: it needs lines of another kind"
        )
    if name is None:
        return scores
    served, own = getattr(scores, name), getattr(alone, name)
    if name == "perplexity":
        kept = own / served
    else:
        kept = served / own if own else None
    return replace(scores, kept=kept, metric=name)
