"""What is left of each tenant's quality when a store serves it, beside the tenant running alone.

Logits are held for a few rows at a time. A tenant's own, which each way to serve it is compared
with, are kept on disk.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import SamplingParams, Store, load_engine
from common.build.scoring import divergence
from common.progress import Progress, silent
from common.serving.checks import Prompt
from common.serving.engine import Engine
from scripts.quality.rows import (
    Row,
    judged_logits,
    negative_log_likelihood,
    question_row,
    spread,
    text_rows,
)
from scripts.quality.scores import Memory, Result, Scores, rouge, with_kept
from scripts.quality.task import DEFAULTS, Options, Task, TaskError, check_tasks
from scripts.store_views import alone_store

# Tenants up to this many bytes run alone side by side in one engine; larger ones one after another.
SIDE_BY_SIDE_BYTES = 4 << 30

# Positions compared at once, so that float64 copies of their logits stay small.
CHUNK = 64


@dataclass(frozen=True)
class Own:
    """A tenant alone: its rows, its scores, and its logits on disk, float32 [positions, vocab]."""

    tenant: str
    task: Task
    prompts: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]
    scores: Scores
    words: int
    text_bytes: int
    logits: np.ndarray | None


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
    check_tasks(tasks, store.tenants)
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


def evaluate_store(
    store: Store,
    tasks: Mapping[str, Task],
    options: Options = DEFAULTS,
    on_result: Callable[[Result], None] = lambda result: None,
    progress: Progress = silent,
) -> list[Result]:
    """A store as it is, beside each of its tenants alone."""
    name = store.path.name
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="moetel-eval-") as scratch:
        begun = time.perf_counter()
        own = measure_alone(store, tasks, options, Path(scratch), progress)
        scores = {name: alone.scores for name, alone in own.items()}
        every = alone_store(store, store.tenants)
        results = [result_of("alone", (name, 0), every, scores, begun, begun)]
        on_result(results[0])
        begun = time.perf_counter()
        scores = measure(store, own, options, progress)
        policy = store.plan.policy.replace("_", " ")
        results.append(result_of(policy, (name, 0), store, scores, begun, begun))
        on_result(results[1])
    return results


def result_of(
    label: str,
    material: tuple[str, int],
    store: Store,
    scores: Mapping[str, Scores],
    begun: float,
    built: float,
    expected: Mapping[str, float] | None = None,
) -> Result:
    """material: name and seed of what was measured. begun, built: when, seconds."""
    now = time.perf_counter()
    seconds = round(built - begun, 2), round(now - built, 2)
    return Result(label, *material, Memory.of(store), dict(scores), *seconds, expected)


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
    rows = [row for ids in texts for row in text_rows(ids, window, options.stride or window)]
    for question, prompt, answer in zip(task.questions, prompts, answers, strict=True):
        if options.forced == "given" and question.answer is not None:
            given = question.answer
            answer = tuple(engine.answer_ids(tenant, given) if isinstance(given, str) else given)
        rows.append(question_row(engine, tenant, prompt, answer))
    rows = spread([row for row in rows if row.targets], options.positions)
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
    return replace(own, scores=with_kept(scores, scores, options.metric, tenant), logits=stored)


def _served(engine: Engine, own: Own, options: Options) -> Scores:
    _, scores = _answer(engine, own.tenant, own.task, own.prompts, options)
    total, same, positions = 0.0, 0, 0

    def compare(row: Row, values: np.ndarray) -> None:
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
    return with_kept(scores, own.scores, options.metric, own.tenant)


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


def _forced(
    engine: Engine, own: Own, options: Options, on_compared: Callable[[Row, np.ndarray], None]
) -> Scores:
    """Run the rows; perplexity from those that are scored, `on_compared` for those that are
    compared, in order."""
    total, tokens = 0.0, 0
    for row, values in judged_logits(engine, own.tenant, own.rows, options):
        if row.scored:
            for i in range(0, len(values), CHUNK):
                total += negative_log_likelihood(values[i : i + CHUNK], row.targets[i : i + CHUNK])
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
