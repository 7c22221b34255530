"""The choice of the next token where it is drawn or logits are changed, in numpy, for every engine.

Plain greedy rows take the device's most probable token, see `Request.choose`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import RequestError
from common.sampling_params import SamplingParams


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


def adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    banned: Collection[int],
) -> np.ndarray:
    """Logits with biases and penalties, and -inf at the banned ids; a copy. Order as in vLLM's
    sampler."""
    scores = logits.astype(np.float64)
    for token_id, bias in (params.logit_bias or {}).items():
        if not 0 <= token_id < len(scores):
            raise RequestError(
                f"logit_bias names token {token_id}; the vocabulary is 0..{len(scores) - 1}"
            )
        scores[token_id] += bias
    if banned:
        scores[[i for i in banned if i < len(scores)]] = -np.inf
    if params.repetition_penalty != 1:
        seen = np.unique(np.array([*prompt, *answer], dtype=np.int64))
        values = scores[seen]
        scores[seen] = np.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if answer and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(answer, dtype=np.int64), return_counts=True)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def sample(
    logits: np.ndarray,
    params: SamplingParams,
    rng: np.random.Generator,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    banned: Collection[int] = (),
    allowed: np.ndarray | None = None,
) -> int:
    """The next token id. logits: float32 [vocab]; entries of -inf are never chosen.

    prompt, answer: what stands before, for penalties. banned: ids that may not be chosen, unless
    they alone are allowed. allowed: bool [vocab], ids that may be chosen; None: all.
    Order as in transformers' LogitsProcessorList for sampling: penalties, temperature, top-k,
    top-p, min-p, the draw.
    """
    plain = logits
    if params.changes_logits or banned:
        logits = adjusted(logits, params, prompt, answer, banned)
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
                np.cumsum(probabilities), rng.random() * probabilities.sum(), side="right"
            ).clip(0, len(ids) - 1)
        ]
    )
