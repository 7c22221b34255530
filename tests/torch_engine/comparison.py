"""A comparison of an engine's tenant with one Hugging Face model."""

from __future__ import annotations

from typing import Any

import numpy as np

from common import SamplingParams
from tests import helpers
from tests.helpers import TOLERANCE, assert_close, hf_greedy, hf_logits

NEW = SamplingParams(max_new_tokens=10, ignore_eos=True)

LENGTHS = (7, 1, 19, 12)


def compare(engine: Any, name: str, model: Any, seed: int = 0) -> None:
    """Logits of a padded batch on either side, and greedy tokens of a batch, against one Hugging
    Face model."""
    rows = helpers.prompts(seed, LENGTHS, model.config.vocab_size)
    expected = [hf_logits(model, [row])[0] for row in rows]
    for side in ("right", "left"):
        ids, mask = helpers.padded(rows, side)
        found = engine.logits(name, ids, attention_mask=mask)
        for i, row in enumerate(rows):
            # The fixtures' bound is absolute; these random models' logits may be many times as
            # large.
            tolerance = max(TOLERANCE, 1e-5 * float(np.abs(expected[i]).max()))
            assert_close(
                found[i][mask[i] == 1],
                expected[i],
                tolerance,
                f"{name}, {side} padding, {len(row)} tokens",
            )
            assert not found[i][mask[i] == 0].any()
    answers = engine.generate_batch([(name, row) for row in rows], NEW)
    for row, answer in zip(rows, answers, strict=True):
        assert list(answer.token_ids) == hf_greedy(model, row, NEW.max_new_tokens), (
            f"{name}, {len(row)} tokens"
        )
