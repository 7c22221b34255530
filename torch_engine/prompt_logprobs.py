"""Log probabilities of a prompt's tokens, a few rows of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.serving.prompt_logprobs import PromptLogprobs
from torch_engine.models.decoder import heads
from torch_engine.segments import Segment

ROWS = 128  # of float64 [rows, vocabulary] at once


def score(segment: Segment, hidden: Tensor, targets: Sequence[int], top: int) -> PromptLogprobs:
    """Of the tokens behind some of one sequence's.

    Args:
        segment: of the tenant.
        hidden: [T, H], of the tokens before each target; there may be one more, without a target.
    """
    if not targets:
        return PromptLogprobs.of(np.zeros((0, top), dtype=np.float32), [], top)
    found = [
        _score(segment, hidden[start : start + ROWS], targets[start : start + ROWS], top)
        for start in range(0, len(targets), ROWS)
    ]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)]
    return PromptLogprobs(np.array(targets, dtype=np.int64), *columns)


def _score(
    segment: Segment, hidden: Tensor, targets: Sequence[int], top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PromptLogprobs` behind `token_ids`."""
    (logits,) = heads([segment], [hidden[: len(targets)]])
    logprobs = logits.double().log_softmax(dim=-1)
    ids = torch.tensor(targets, dtype=torch.int64).to(logits.device)[:, None]
    own = logprobs.gather(1, ids)
    ranks = (logprobs > own).sum(dim=1) + 1
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=1)
    return own[:, 0], ranks, best.indices, best.values
