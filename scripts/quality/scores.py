"""What is found: a tenant's scores, the memory it took, and both of all tenants."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import EngineError, Store
from scripts.quality.task import Metric, TaskError


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


def with_kept(scores: Scores, alone: Scores, metric: Metric, tenant: str) -> Scores:
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
