"""What a model gives the tokens of a prompt: the log probability of each behind those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.serving.sampling import TokenLogprob, log_probabilities


@dataclass(frozen=True)
class PromptLogprobs:
    """Of tokens in a row.

    token_ids, ranks: int64 [tokens]. logprobs: float64 [tokens]. top_ids: int64 [tokens, top], the
    most probable tokens in each one's place, best first. top_logprobs: float64 [tokens, top].
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, token_ids: Sequence[int], top: int) -> PromptLogprobs:
        """logits: float32 [tokens, vocab], behind the token before each."""
        rows = zip(logits, token_ids, strict=True)
        each = [log_probabilities(values, token_id, top) for values, token_id in rows]
        width = min(top, logits.shape[-1])
        return cls(
            np.array(token_ids, dtype=np.int64),
            np.array([one.logprob for one in each]),
            np.array([one.rank for one in each], dtype=np.int64),
            np.array([[i for i, _ in one.top] for one in each], np.int64).reshape(len(each), width),
            np.array([[p for _, p in one.top] for one in each], np.float64).reshape(
                len(each), width
            ),
        )

    def tokens(self) -> list[TokenLogprob]:
        """One for each token."""
        tops = [
            tuple(zip(ids, logprobs, strict=True))
            for ids, logprobs in zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        ]
        columns = (self.token_ids.tolist(), self.logprobs.tolist(), tops, self.ranks.tolist())
        return [TokenLogprob(*one) for one in zip(*columns, strict=True)]
