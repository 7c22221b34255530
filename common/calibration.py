"""What a tenant's experts see and what changing them does, measured on a few of its prompts.

A tenant runs alone, with all its own experts, on its calibration examples. From the routing of
every layer come
- how often each expert is picked, and the sum of its squared gates;
- a sample of the inputs of each expert, with their gates: on these, other experts are compared with
  the tenant's own;
- sensitivity: how much a squared error in a layer's output, of the kind that other tenants' experts
  make there, moves the tenant's next-token distribution (Kullback-Leibler divergence a unit of
  squared error).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.consolidation import MISS, Plan
from common.dtypes import to_float32
from common.errors import PlanError, RequestError
from common.experts import forward
from common.families import ExpertSpec
from common.progress import Progress, silent
from common.sampling import SamplingParams
from common.store.store import Store
from common.units import is_whole

if TYPE_CHECKING:
    from common.engine import Engine

Prompt = str | Sequence[int]

# Inputs kept for each expert of a tenant, unless that takes more than so many bytes: then fewer,
# down to the least.
MOST_SAMPLES, LEAST_SAMPLES = 1024, 256
SAMPLE_BYTES = 1 << 30
# Scored tokens that sensitivities are measured on.
SENSITIVITY_TOKENS = 2048
# Bytes of logits held at once while they are compared.
LOGITS_BYTES = 1 << 28
# Bytes of experts that a tenant running alone keeps in memory; what does not fit is read again when
# it is needed.
SPARE_BYTES = 4 << 30


@dataclass(frozen=True)
class Example:
    """A prompt and, if it is known, its answer. A text to be continued by nothing has an empty
    answer."""

    prompt: Prompt
    answer: Prompt | None = None


def json_fault(error: ValueError) -> str:
    """What is wrong with a line of JSON, without the number of the only line that the parser
    saw."""
    return (
        f"{error.msg} at character {error.pos + 1}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )


def refused_pair(value: Mapping[str, Any]) -> str | None:
    """What is wrong with a JSONL line that has two fields of which one would be ignored; None if
    nothing is."""
    if "text" in value and "prompt" in value:
        return "has both prompt and text; keep prompt (with answer) or text, or write two lines"
    if "text" in value and "answer" in value:
        return "has both text and answer; write prompt and answer, or text alone"
    return None


@dataclass(frozen=True)
class CalibrationSet:
    """Examples of one tenant's use. Where an answer is None, the tenant's own greedy one is taken.

    max_new_tokens: longest answer that is generated.
    """

    examples: tuple[Example, ...]
    max_new_tokens: int = 64

    @classmethod
    def of(cls, prompts: Iterable[Prompt], max_new_tokens: int = 64) -> CalibrationSet:
        """Prompts to be answered by the tenant itself."""
        return cls(tuple(Example(p) for p in prompts), max_new_tokens)

    @classmethod
    def texts(cls, texts: Iterable[Prompt]) -> CalibrationSet:
        """Texts as they are, nothing generated."""
        return cls(tuple(Example(t, "" if isinstance(t, str) else ()) for t in texts))

    @classmethod
    def read(cls, path: str | Path, max_new_tokens: int = 64) -> CalibrationSet:
        """A JSONL file: lines of {"prompt": ..., "answer": ...}, {"prompt": ...} or {"text": ...}.

        Raises RequestError that names the file and the line.
        """
        path = Path(path)
        examples = []
        try:
            # Not splitlines(): a JSON string may hold characters that it takes for the end of a
            # line.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise RequestError(
                    f"{path}, line {number}: not JSON ({json_fault(error)}); write one object a "
                    "line"
                ) from error
            if not isinstance(value, dict) or not ({"prompt", "text"} & set(value)):
                raise RequestError(
                    f'{path}, line {number}: expected {{"prompt": ...}}, '
                    '{"prompt": ..., "answer": ...} or '
                    '{"text": ...}'
                )
            pair = refused_pair(value)
            if pair is not None:
                raise RequestError(f"{path}, line {number}: {pair}")
            prompt = value.get("prompt", value.get("text"))
            answer = value.get("answer", None if "prompt" in value else "")
            if (
                not isinstance(prompt, str)
                or not prompt
                or not (answer is None or isinstance(answer, str))
            ):
                raise RequestError(
                    f"{path}, line {number}: prompt, answer and text are strings, and not empty"
                )
            examples.append(Example(prompt, answer))
        if not examples:
            raise RequestError(f"{path}: holds no example; give at least one line")
        return cls(tuple(examples), max_new_tokens)


@dataclass(frozen=True)
class Profile:
    """What was measured of one tenant.

    tokens: number of tokens seen in each layer, int64 [layers] (Switch: encoder's and decoder's
        differ).
    counts: int64 [layers, experts], how many of them the expert was picked for.
    gate_squares: float64 [layers, experts], sum of squared gates over these.
    inputs: float32 [rows, H], sampled inputs; gates: float32 [rows]; starts: int64 [layers *
        experts + 1], whose rows.
    sensitivity: float64 [layers], divergence (nats a token) by squared error (a token); 0: not
        measured.
    """

    tokens: np.ndarray
    counts: np.ndarray
    gate_squares: np.ndarray
    inputs: np.ndarray
    gates: np.ndarray
    starts: np.ndarray
    sensitivity: np.ndarray

    def sample(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Sampled inputs float32 [n, H] of an expert and their gates float32 [n]."""
        place = layer * self.counts.shape[1] + expert
        rows = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return to_float32(self.inputs[rows]), self.gates[rows]

    def check(self, spec: ExpertSpec, tenant: str) -> None:
        """Whether it is of experts like these. Raises PlanError."""
        found = (*self.counts.shape, self.inputs.shape[-1])
        expected = (spec.num_layers, spec.num_experts, spec.hidden_size)
        if found != expected:
            raise PlanError(
                f"calibration of {tenant!r} is of {found[0]} layers with {found[1]} experts of "
                f"width {found[2]}, the "
                f"store's have {expected[0]}, {expected[1]} and {expected[2]}; measure it on this "
                "store"
            )

    def to_json(self, put: Callable[[np.ndarray], str]) -> dict[str, Any]:
        """For a manifest; arrays go through `put`, which returns an object's id."""
        objects = {
            name: put(getattr(self, name)) for name in ("inputs", "gates") if len(self.inputs)
        }
        return {
            "objects": objects,
            "rows": len(self.inputs),
            **{name: getattr(self, name).tolist() for name in _TABLES},
        }

    @classmethod
    def from_store(cls, store: Store, tenant: str) -> Profile | None:
        """The profile that a store keeps of a tenant, None if it has none. Raises StoreError where
        it is damaged."""
        value = store.manifest.calibration.get(tenant)
        if value is None:
            return None
        rows, hidden = int(value["rows"]), store.experts.hidden_size
        arrays = {"inputs": np.zeros((0, hidden), np.float32), "gates": np.zeros(0, np.float32)}
        for name, object_id in value["objects"].items():
            ref = store.objects.ref(
                object_id, "float32", (rows, hidden) if name == "inputs" else (rows,)
            )
            arrays[name] = ref.map()  # not read: large models' inputs take a gigabyte a tenant
            store.objects.check(ref, arrays[name])
        tables = {name: np.array(value[name], dtype=kind) for name, kind in _TABLES.items()}
        return cls(**tables, **arrays)


_TABLES = {
    "tokens": np.int64,
    "counts": np.int64,
    "gate_squares": np.float64,
    "starts": np.int64,
    "sensitivity": np.float64,
}


class _Recorder:
    """Collects a profile from what an engine's layers show."""

    def __init__(self, num_layers: int, num_experts: int, hidden: int, samples: int, seed: int):
        self.tokens = np.zeros(num_layers, dtype=np.int64)
        self.counts = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.gate_squares = np.zeros((num_layers, num_experts))
        self._samples, self._rng = samples, np.random.default_rng(seed)
        self._kept: dict[tuple[int, int], list[tuple[float, np.ndarray, float]]] = {}
        self._hidden = hidden

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, ids: np.ndarray, gates: np.ndarray
    ) -> None:
        self.tokens[layer] += len(x)
        for expert in np.unique(ids):
            rows, choices = np.nonzero(ids == expert)
            g = gates[rows, choices].astype(np.float64)
            self.counts[layer, expert] += len(rows)
            self.gate_squares[layer, expert] += float((g * g).sum())
            # A uniform sample: the rows with the smallest of random keys.
            kept = self._kept.setdefault((layer, int(expert)), [])
            kept += [
                (float(k), x[r].copy(), float(w))
                for k, r, w in zip(self._rng.random(len(rows)), rows, g, strict=True)
            ]
            if len(kept) > 2 * self._samples:
                kept.sort(key=lambda row: row[0])
                del kept[self._samples :]

    def arrays(self) -> dict[str, np.ndarray]:
        starts, inputs, gates = [0], [], []
        for layer in range(self.counts.shape[0]):
            for expert in range(self.counts.shape[1]):
                kept = sorted(self._kept.get((layer, expert), []), key=lambda row: row[0])[
                    : self._samples
                ]
                inputs += [row[1] for row in kept]
                gates += [row[2] for row in kept]
                starts.append(len(inputs))
        return {
            "inputs": np.array(inputs, dtype=np.float32).reshape(-1, self._hidden),
            "gates": np.array(gates, dtype=np.float32),
            "starts": np.array(starts, dtype=np.int64),
        }


@dataclass(frozen=True)
class Row:
    """Token ids to run, and which logits count.

    An answer's last token is not among them: it is what the last logits are for. Decoder-only:
    prompt holds prompt and answer, whose logits count from `first` on (a text's from 0).
    Encoder-decoder: the prompt, and the answer that the decoder reads after its start token; all of
    the decoder's logits count.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    first: int


def rows_of(engine: Engine, tenant: str, examples: CalibrationSet) -> list[Row]:
    """Examples as token ids, answers generated where they are not given.

    Raises RequestError for a text without a tokenizer and for a prompt that the tenant cannot take.
    """
    config = engine.store.config(tenant)
    missing = [i for i, e in enumerate(examples.examples) if e.answer is None]
    params = SamplingParams(max_new_tokens=examples.max_new_tokens)
    generated = engine.generate_batch(
        [(tenant, examples.examples[i].prompt) for i in missing], params
    )
    found = dict(zip(missing, generated, strict=True))
    rows = []
    for i, example in enumerate(examples.examples):
        if i in found:
            prompt, answer = found[i].prompt_token_ids, found[i].token_ids
        else:
            prompt = _ids(engine, tenant, example.prompt)
            answer = _answer_ids(engine, tenant, example.answer)
        # An answer's last token (end of sequence, or where the tenant was stopped) is foretold and
        # never read: nothing comes after it when the tenant serves.
        read = tuple(answer[:-1])
        if config.is_encoder_decoder:
            # The decoder reads a start token before the answer.
            rows.append(
                Row(tuple(prompt[: config.max_positions]), read[: config.max_positions - 1], 0)
            )
        else:
            whole = (*prompt, *read)[: config.max_positions]
            rows.append(Row(tuple(whole), (), min(len(prompt), len(whole)) - 1 if answer else 0))
    return rows


def _ids(engine: Engine, tenant: str, prompt: Prompt | None) -> tuple[int, ...]:
    if prompt is None:
        return ()
    return tuple(engine.tokenize(tenant, prompt) if isinstance(prompt, str) else prompt)


def _answer_ids(engine: Engine, tenant: str, answer: Prompt | None) -> tuple[int, ...]:
    if not answer:
        return ()
    return tuple(engine.answer_ids(tenant, answer) if isinstance(answer, str) else answer)


def iter_logits(engine: Engine, tenant: str, rows: Sequence[Row]) -> Iterator[np.ndarray]:
    """The scored logits of each row, float32 [positions, vocab]: as many as its answer, or its
    text, has tokens."""
    config = engine.store.config(tenant)
    start = engine.start_id(tenant) if config.is_encoder_decoder else 0
    longest = max((max(len(r.prompt), len(r.answer) + 1) for r in rows), default=1)
    size = max(1, min(engine.max_batch_size, LOGITS_BYTES // (4 * longest * config.vocab_size)))
    for begin in range(0, len(rows), size):
        chunk = rows[begin : begin + size]
        if config.is_encoder_decoder:
            answers = [[start, *r.answer] for r in chunk]
            found = engine.logits(tenant, [list(r.prompt) for r in chunk], answers)
            for row, values in zip(answers, found, strict=True):
                yield values[: len(row)]
        else:
            found = engine.logits(tenant, [list(r.prompt) for r in chunk])
            for r, values in zip(chunk, found, strict=True):
                yield values[r.first : len(r.prompt)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(own: np.ndarray, served: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence KL(own || served) in nats: float64 [positions], from logits
    [positions, vocab]."""
    p, q = log_softmax(own), log_softmax(served)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def alone(store: Store) -> Store:
    """The store with no resident copy: every tenant computes with its own experts, read when they
    are needed."""
    spec = store.experts
    serving = np.full((len(store.tenants), spec.num_layers, spec.num_experts), MISS, dtype=np.int32)
    plan = Plan("alone", store.tenants, spec.num_layers, spec.num_experts, (), serving)
    return store.with_plan(plan)


def usual_samples(spec: ExpertSpec) -> int:
    """Inputs kept for each expert of a tenant: as many as are of use to fits, or as `SAMPLE_BYTES`
    hold."""
    fitting = SAMPLE_BYTES // (4 * spec.hidden_size * spec.num_positions)
    return max(LEAST_SAMPLES, min(MOST_SAMPLES, fitting))


def calibrate(
    store: Store,
    sets: Mapping[str, CalibrationSet],
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Profile]:
    """Measure the tenants that have examples. Needs the engine of the store's family.

    samples: inputs kept for each expert; None: `usual_samples`. Raises RequestError, EngineError,
        UnknownTenantError.
    """
    from common.engine import load_engine  # which imports stores, whose builds import this

    samples = usual_samples(store.experts) if samples is None else samples
    if not is_whole(samples) or samples < 1:
        raise RequestError(f"samples is {samples!r}; give a whole number from 1")
    for tenant, examples in sets.items():
        if not examples.examples:
            raise RequestError(f"calibration of {tenant!r} holds no example; give at least one")
    found: dict[str, Profile] = {}
    spec = store.experts
    spare = max(spec.top_k, min(spec.num_positions, SPARE_BYTES // (spec.copy_elements * 4)))
    with (
        load_engine(alone(store), dtype="float32", spare_slots=spare) as engine,
        progress("calibrating", len(sets)) as advance,
    ):
        for tenant, examples in sets.items():
            rows = rows_of(engine, tenant, examples)
            recorder = _Recorder(spec.num_layers, spec.num_experts, spec.hidden_size, samples, seed)
            with observing(engine, recorder):
                for _ in iter_logits(engine, tenant, rows):
                    pass
            sensitivity = _sensitivity(engine, store, tenant, rows)
            found[tenant] = Profile(
                recorder.tokens,
                recorder.counts,
                recorder.gate_squares,
                **recorder.arrays(),
                sensitivity=sensitivity,
            )
            advance()
    return found


@contextmanager
def observing(engine: Engine, observer: Any) -> Iterator[None]:
    """Show routing to `observer` inside the block."""
    engine.observe(observer)
    try:
        yield
    finally:
        engine.observe(None)


class _Swap:
    """Adds to one layer's output what the experts of other tenants, in turn, would change."""

    def __init__(self, store: Store, tenant: str, layer: int):
        self._store, self._layer = store, layer
        others = [name for name in store.tenants if name != tenant]
        self._owner = {
            e: others[(layer + e) % len(others)] for e in range(store.experts.num_experts)
        }
        self._tenant = tenant
        self._weights: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self.squares, self.tokens = 0.0, 0

    def _expert(self, tenant: str, expert: int) -> dict[str, np.ndarray]:
        if (tenant, expert) not in self._weights:
            self._weights[tenant, expert] = self._store.own_expert(tenant, self._layer, expert)
        return self._weights[tenant, expert]

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        if layer != self._layer:
            return None
        change = np.zeros(x.shape, dtype=np.float32)
        for expert in np.unique(ids):
            rows, choices = np.nonzero(ids == expert)
            mine, theirs = (
                self._expert(t, int(expert)) for t in (self._tenant, self._owner[int(expert)])
            )
            spec = self._store.experts
            difference = forward(spec, x[rows], theirs) - forward(spec, x[rows], mine)
            np.add.at(change, rows, gates[rows, choices][:, None] * difference)
        self.squares += float((change.astype(np.float64) ** 2).sum())
        self.tokens += len(x)
        return change


def _sensitivity(engine: Engine, store: Store, tenant: str, rows: Sequence[Row]) -> np.ndarray:
    """float64 [layers]. 0 where other tenants' experts change nothing."""
    found = np.zeros(store.experts.num_layers)
    if len(store.tenants) < 2:
        return found
    chosen, count = [], 0
    for row in rows:
        chosen.append(row)
        count += len(row.prompt) + len(row.answer)
        if count >= SENSITIVITY_TOKENS:
            break
    own = list(iter_logits(engine, tenant, chosen))
    for layer in range(len(found)):
        swap = _Swap(store, tenant, layer)
        with observing(engine, swap):
            served = iter_logits(engine, tenant, chosen)
            total = [divergence(a, b) for a, b in zip(own, served, strict=True)]
        if swap.squares > 0:
            found[layer] = float(np.concatenate(total).mean()) / (
                swap.squares / max(1, swap.tokens)
            )
    return found
