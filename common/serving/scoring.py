"""Logits at every position of whole rows of tokens, as a Hugging Face model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import RequestError
from common.serving.backend import Backend
from common.serving.checks import check_ids
from common.store import Store


def logits_of(
    backend: Backend,
    store: Store,
    tenant: str,
    input_ids: Any,
    decoder_input_ids: Any = None,
    attention_mask: Any = None,
) -> np.ndarray:
    """See `Engine.logits`."""
    config = store.config(tenant)
    rows = _rows(input_ids, "input_ids")
    places = [np.arange(len(row)) for row in rows]
    if attention_mask is not None:
        places = _unmasked(rows, attention_mask)
    if config.is_encoder_decoder != (decoder_input_ids is not None):
        needs = "needs decoder_input_ids as well"
        what = needs if decoder_input_ids is None else "reads input_ids alone"
        raise RequestError(
            f"family {store.family.name!r} {what}; give what its Hugging Face model takes"
        )
    prompts = [
        check_ids(tenant, config, [row[i] for i in place], "input_ids")
        for row, place in zip(rows, places, strict=True)
    ]
    decoder_rows = None
    if decoder_input_ids is not None:
        decoder_rows = [
            check_ids(tenant, config, row, "decoder_input_ids")
            for row in _rows(decoder_input_ids, "decoder_input_ids")
        ]
        if len(decoder_rows) != len(rows):
            raise RequestError(
                f"{len(decoder_rows)} rows of decoder_input_ids for {len(rows)} of input_ids"
            )
    found = backend.logits(tenant, prompts, decoder_rows)
    if decoder_rows is not None:
        places = [np.arange(len(row)) for row in decoder_rows]
    width = max(len(row) for row in decoder_rows or rows)
    out = np.zeros((len(found), width, found[0].shape[-1]), dtype=np.float32)
    for i, (place, values) in enumerate(zip(places, found, strict=True)):
        out[i, place] = values
    return out


def _unmasked(rows: list[list[int]], attention_mask: Any) -> list[np.ndarray]:
    """Where each row's tokens are: int64 [tokens], adjacent."""
    mask = [np.asarray(m).astype(bool) for m in attention_mask]
    if len(mask) != len(rows) or any(len(m) != len(r) for m, r in zip(mask, rows, strict=True)):
        raise RequestError("attention_mask has another shape than input_ids")
    places = [np.flatnonzero(m) for m in mask]
    if any(len(p) and p[-1] - p[0] + 1 != len(p) for p in places):
        raise RequestError(
            "attention_mask has a gap; give 1 at adjacent tokens of a row and 0 before or "
            "after them"
        )
    return places


def _rows(ids: Any, what: str) -> list[list[int]]:
    """[batch, seq] of anything array-like, or rows of different lengths, as lists."""

    def row(values: Any) -> Any:
        if isinstance(values, Sequence):
            return list(values)
        return values.tolist() if hasattr(values, "tolist") else values

    rows = ids.tolist() if hasattr(ids, "tolist") else [row(values) for values in ids]
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        raise RequestError(
            f"{what} must be [batch, seq]: a list of rows of token ids with at least one row"
        )
    return rows
