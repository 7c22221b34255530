"""Token ids to feed, the positions that are judged, and their logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.serving.engine import Engine
from scripts.quality.task import Options


@dataclass(frozen=True)
class Row:
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


def text_rows(ids: tuple[int, ...], window: int, stride: int) -> Iterator[Row]:
    """Windows over a text. Each token but the first is judged once, by all that goes before it in
    its window."""
    begin = 1
    while begin < len(ids):
        end = min(len(ids), begin + (window if begin == 1 else stride))
        first = max(0, end - 1 - window)
        yield Row(ids[first : end - 1], None, begin - 1 - first, ids[begin:end], scored=True)
        begin = end


def question_row(
    engine: Engine, tenant: str, prompt: tuple[int, ...], answer: tuple[int, ...]
) -> Row:
    """The answer behind its prompt, judged at the answer's tokens; cut at the tenant's context."""
    config = engine.store.config(tenant)
    if config.is_encoder_decoder:
        answer = answer[: config.max_positions]
        decoder_ids = (engine.start_id(tenant), *answer[:-1])
        return Row(prompt, decoder_ids, 0, answer, scored=False)
    answer = answer[: config.max_positions + 1 - len(prompt)]
    return Row((*prompt, *answer[:-1]), None, len(prompt) - 1, answer, scored=False)


def spread(rows: Sequence[Row], limit: int) -> list[Row]:
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


def negative_log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Sum over positions, nats. logits: float32 [positions, vocab]."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=-1)
    normaliser = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=-1))
    return float((normaliser - wide[np.arange(len(targets)), list(targets)]).sum())


def judged_logits(
    engine: Engine, tenant: str, rows: Sequence[Row], options: Options
) -> Iterator[tuple[Row, np.ndarray]]:
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
