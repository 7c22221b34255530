"""The choice of the next token where it is drawn or logits are changed, in numpy.

A backend that chooses on its device gives the same tokens, see `Backend.chooses`. Plain greedy rows
take the device's most probable token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from common.sampling_params import SamplingParams


@dataclass(frozen=True)
class Choice:
    """How one next token is chosen.

    Attributes:
        prompt, answer: token ids that stand before, for penalties.
        banned: ids that may not be chosen, unless they alone are allowed.
        forced: the token that is taken whatever the logits are.
        uniform: what the token is drawn with, from 0 to below 1.
        allowed: gives bool [vocab], ids that may be chosen, or None for all. It may wait for a
            thread that computes them, so it is called late.
    """

    params: SamplingParams
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    banned: Collection[int] = ()
    forced: int | None = None
    uniform: float = 0.0
    allowed: Callable[[], np.ndarray | None] | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """token_id: the chosen token; logprob: its natural log probability. top: (token id, logprob) of
    the most probable tokens, best first, as many as were asked for. rank: 1 for the most probable
    one."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int


def log_probabilities(logits: np.ndarray, token_id: int, top: int) -> TokenLogprob:
    """Of the chosen token, and of the `top` most probable ones. logits: float32 [vocab]."""
    scores = logits.astype(np.float64)
    highest = scores.max()
    scores = scores - (highest + np.log(np.exp(scores - highest).sum()))
    top = min(top, len(scores))
    best = np.argpartition(-scores, top - 1)[:top] if top else np.zeros(0, dtype=np.int64)
    best = best[np.argsort(-scores[best], kind="stable")]
    return TokenLogprob(
        token_id,
        float(scores[token_id]),
        tuple((int(i), float(scores[i])) for i in best),
        int((scores > scores[token_id]).sum()) + 1,
    )


def adjusted(logits: np.ndarray, choice: Choice) -> np.ndarray:
    """Logits with biases and penalties, and -inf at the banned ids; a copy. Order as in vLLM's
    sampler."""
    params = choice.params
    scores = logits.astype(np.float64)
    for token_id, bias in (params.logit_bias or {}).items():
        scores[token_id] += bias
    if choice.banned:
        scores[[i for i in choice.banned if i < len(scores)]] = -np.inf
    if params.repetition_penalty != 1:
        seen = np.unique(np.array([*choice.prompt, *choice.answer], dtype=np.int64))
        values = scores[seen]
        scores[seen] = np.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if choice.answer and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(choice.answer, dtype=np.int64), return_counts=True)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def sample(logits: np.ndarray, choice: Choice) -> int:
    """The next token id. logits: float32 [vocab]; entries of -inf are never chosen.

    Order as in transformers' LogitsProcessorList for sampling: penalties, temperature, top-k,
    top-p, min-p, the draw.
    """
    if choice.forced is not None:
        return choice.forced
    params, plain = choice.params, logits
    if params.changes_logits or choice.banned:
        logits = adjusted(logits, choice)
    allowed = None if choice.allowed is None else choice.allowed()
    if allowed is not None:
        left = np.where(allowed, logits, -np.inf)
        logits = left if np.isfinite(left).any() else np.where(allowed, plain, -np.inf)
    if params.greedy:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / params.temperature
    ids = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        # Keep ties with the k-th score, as a threshold on the value does.
        threshold = np.partition(scores, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scores >= threshold)
        scores = scores[ids]
    scores = scores - scores.max()
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        keep = order[before < params.top_p]
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    if params.min_p > 0:
        keep = np.flatnonzero(probabilities >= params.min_p * probabilities.max())
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    return int(
        ids[
            np.searchsorted(
                np.cumsum(probabilities), choice.uniform * probabilities.sum(), side="right"
            ).clip(0, len(ids) - 1)
        ]
    )
