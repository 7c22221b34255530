"""What a step is made of: rows that decode by a captured graph, and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from common.serving.backend import Observer, Part, Step
from common.serving.prompt_logprobs import PromptLogprobs
from common.serving.sampling import TokenLogprob
from torch_engine import sampling
from torch_engine.decode.step import DecodeSteps
from torch_engine.experts.pool import ExpertPool
from torch_engine.layers.attention import kind_of
from torch_engine.layers.cache import Arena
from torch_engine.models.decoder import forward, heads
from torch_engine.prompt_logprobs import score
from torch_engine.segments import Segment
from torch_engine.sequences import CachedSequence, segment_of
from torch_engine.tenants.weights import TenantWeights


@dataclass
class Results:
    """What a step gave so far: the fields of `Step`. waited: whether the host waited for it."""

    token_ids: np.ndarray
    logits: list[np.ndarray | None]
    misses: np.ndarray
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    waited: bool = False

    @classmethod
    def of(cls, parts: int) -> Results:
        """Nothing yet."""
        return cls(np.full(parts, -1, np.int64), [None] * parts, np.zeros(parts, np.int64))

    def take(
        self,
        parts: Sequence[Part],
        found: Sequence[tuple[Sequence[int], Tensor]],
        winners: Tensor,
    ) -> None:
        """Take the most probable tokens or the chosen ones, and logits where they are wanted.

        found: parts' numbers and their logits [rows, V]; winners: int64 [rows of all].
        """
        numbers = [i for each, _ in found for i in each]
        chosen = [(each, _chosen(parts, each, values)) for each, values in found]
        sent = [rows.flatten() for _, rows in chosen if rows is not None]
        # One look at the device for all tenants' tokens; float64 holds every id.
        known = (
            torch.cat([winners.double(), *sent]).cpu().numpy() if sent else winners.cpu().numpy()
        )
        self.token_ids[numbers] = known[: len(numbers)]
        self.waited = True
        start = len(numbers)
        for each, rows in chosen:
            if rows is None:
                continue
            lines = known[start : start + rows.numel()].reshape(rows.shape)
            start += rows.numel()
            for i, line in zip([i for i in each if parts[i].choice], lines, strict=True):
                choice = parts[i].choice
                assert choice is not None
                self.token_ids[i] = line[0]
                if (logprob := sampling.logprob(line, choice)) is not None:
                    self.logprobs[i] = logprob
        for each, values in found:
            wanted = [k for k, i in enumerate(each) if parts[i].want_logits]
            if wanted:
                kept = values if len(wanted) == len(each) else values[wanted]
                for row, k in zip(kept.float().cpu().numpy(), wanted, strict=True):
                    self.logits[each[k]] = row

    def step(self, lookups: np.ndarray, seconds: dict[str, float]) -> Step:
        """All of it. lookups: int64 [parts], of experts; seconds: of reconfiguration, by tenant."""
        return Step(
            self.token_ids,
            self.logits,
            lookups - self.misses,
            self.misses,
            seconds,
            self.prompt_logprobs,
            self.logprobs,
        )


def _chosen(parts: Sequence[Part], numbers: Sequence[int], logits: Tensor) -> Tensor | None:
    """What `sampling.choose` says of the parts that say how; None: none does."""
    rows = [k for k, i in enumerate(numbers) if parts[i].choice is not None]
    if not rows:
        return None
    choices = [choice for i in numbers if (choice := parts[i].choice) is not None]
    if len(rows) < len(numbers):
        logits = torch.cat([logits[k : k + 1] for k in rows])  # an index of numbers would wait
    return sampling.choose(logits, choices)


@dataclass(frozen=True)
class PendingStep:
    """Parts of a step, their sequences and tenants' weights, and what the step gave so far."""

    parts: Sequence[Part]
    sequences: Sequence[CachedSequence]
    weights: Mapping[str, TenantWeights]
    results: Results


def decode_rows(step: PendingStep, order: Sequence[int], decode: DecodeSteps, cache: Arena) -> None:
    """Append one token to each of these parts' sequences; those of a tenant are together."""
    sequences = [step.sequences[i] for i in order]
    ids = [s.take(step.parts[i])[0] for i, s in zip(order, sequences, strict=True)]
    for sequence in sequences:
        cache.reserve(sequence.blocks, sequence.length)
    winners, values = decode.run(
        step.weights,
        [(name, len(list(same))) for name, same in groupby(s.tenant for s in sequences)],
        ids,
        [s.length for s in sequences],
        [s.blocks for s in sequences],
    )
    step.results.take(step.parts, [(order, values)], winners)


def compute(
    step: PendingStep,
    numbers: Sequence[int],
    pool: ExpertPool,
    cache: Arena,
    observer: Observer | None,
) -> None:
    """Advance these parts' sequences, whatever they do."""
    by_tenant: dict[str, list[int]] = {}
    for i in numbers:
        by_tenant.setdefault(step.sequences[i].tenant, []).append(i)
    segments: list[Segment] = []
    order: list[int] = []
    start = 0
    # Those whose attention can be computed together, together.
    for name in sorted(by_tenant, key=lambda n: kind_of(step.weights[n].shape.attention)):
        mine = by_tenant[name]
        # Single tokens first: see `Segment`.
        mine.sort(key=lambda i: step.parts[i].read > 0)
        index = pool.plan.tenants.index(name)
        read = [(step.sequences[i], step.parts[i]) for i in mine]
        segments.append(segment_of(index, step.weights[name], start, read, cache, pool.device))
        order += mine
        start = segments[-1].stop
    hidden, misses = forward(segments, pool, cache, observer)
    counts = np.array([step.parts[i].read or 1 for i in order], dtype=np.int64)
    stops = np.cumsum(counts)
    step.results.misses[order] = np.add.reduceat(misses, stops - counts)
    for segment in segments:
        for i, stop in zip(order, stops.tolist(), strict=True):
            top = step.parts[i].prompt_logprobs
            if top is not None and segment.start < stop <= segment.stop:
                sequence, count = step.sequences[i], step.parts[i].read
                targets = sequence.tokens[sequence.length - count + 1 : sequence.length + 1]
                states = hidden[stop - count : stop]
                step.results.prompt_logprobs[i] = score(segment, states, targets, top)
                step.results.waited = True
    answering: list[Segment] = []
    rows: list[Tensor] = []
    numbers_of: list[list[int]] = []
    for segment in segments:
        ends = [
            (i, int(stop) - 1)
            for i, stop in zip(order, stops, strict=True)
            if segment.start < stop <= segment.stop and step.sequences[i].unread == 0
        ]
        if not ends:
            continue
        lasts = [last for _, last in ends]
        if lasts == list(range(segment.start, segment.stop)):
            rows.append(hidden[segment.start : segment.stop])
        else:
            rows.append(hidden.index_select(0, torch.tensor(lasts, device=pool.device)))
        answering.append(segment)
        numbers_of.append([i for i, _ in ends])
    found = list(zip(numbers_of, heads(answering, rows), strict=True))
    if found:
        winners = torch.cat([values.argmax(dim=-1) for _, values in found])
        step.results.take(step.parts, found, winners)
