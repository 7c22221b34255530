"""Decoding: one token more for sequences that are read.

An answer that was given before, and whose cache was freed since, is put into the decoder at once,
with the start token, when its prompt is read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_engine.devices import Devices
from jax_engine.steps.kv_cache import CacheSize
from jax_engine.steps.kv_cache_manager import KVCacheManager
from jax_engine.steps.layered import Forward
from jax_engine.steps.sequence import (
    PromptBatch,
    SequenceState,
    StepContext,
    count_look_ups,
    padded,
)
from jax_engine.tenants.ready import ReadyTenant


@dataclass(eq=False)
class DecoderCall:
    """A call of the decoder, and the row of each sequence in it.

    forward: if it goes layer by layer. whole: what came of it else.
    """

    tenant: ReadyTenant
    rows: dict[int, int]
    forward: Forward | None = None
    whole: tuple[Any, ...] = ()

    @property
    def found(self) -> tuple[Any, ...]:
        """Winners [B], logits [B, V], and maybe what is to be kept."""
        return self.whole if self.forward is None else self.forward.result


def decode(
    devices: Devices,
    context: StepContext,
    caches: KVCacheManager,
    sizes: Mapping[str, CacheSize],
    sequences: Mapping[int, SequenceState],
    prompts: Sequence[PromptBatch],
    tokens: Mapping[int, int],
) -> list[DecoderCall]:
    """One token more for sequences that answer, and for those just read.

    Args:
        sizes: of the caches in this step.
        prompts: those just read.
        tokens: sequence that answers -> its last token.
    """
    rows_of = {
        batch: caches.add(batch, context.loaded.shape(batch.tenant.name), sizes[batch.tenant.name])
        for batch in prompts
    }
    again = [batch for batch in prompts if any(s.row.answer for s in batch.sequences)]
    tokens = dict(tokens)
    for batch in prompts:
        if batch not in again:
            start = context.loaded.start_ids[batch.tenant.name]
            tokens |= {s.number: start for s in batch.sequences}
    by_tenant: dict[str, dict[int, int]] = {}
    for number, token in tokens.items():
        by_tenant.setdefault(sequences[number].row.tenant, {})[number] = token
    layered = context.is_layered({*(batch.tenant.name for batch in again), *by_tenant})
    calls = [_answer_again(devices, context, batch, layered) for batch in again]
    for name, some in by_tenant.items():
        calls.append(_decode_one(devices, context, caches, context.tenants[name], some, layered))
    context.run([call.forward for call in calls if call.forward])
    for call in calls:
        each = []
        for number, row in call.rows.items():
            count = 1 if number in tokens else 1 + len(sequences[number].row.answer)
            each.append((sequences[number], row, count))
            caches.caches[call.tenant.name].extend(number, count)
        spec = call.tenant.architecture.spec
        layers = range(spec.first_of_decoder, len(spec.shape.layers))
        count_look_ups(call.tenant, layers, each, call.forward)
    for batch, call in zip(again, calls, strict=False):
        caches.caches[batch.tenant.name].write("cache", call.found[2], rows_of[batch])
    return calls


def _answer_again(
    devices: Devices, context: StepContext, batch: PromptBatch, layered: bool
) -> DecoderCall:
    """Whole answers of sequences that answered before."""
    tenant, steps = batch.tenant, context.loaded.steps(batch.tenant)
    start = context.loaded.start_ids[tenant.name]
    answers = [(start, *s.row.answer) for s in batch.sequences]
    ids, lengths = padded(devices, answers, batch.rows)
    rows = {s.number: i for i, s in enumerate(batch.sequences)}
    if layered:
        forward = steps.layered.answer(tenant, ids, lengths, batch.lengths, batch.encoded, False)
        return DecoderCall(tenant, rows, forward)
    pool = context.loaded.pool.leaves
    found = steps.answer(pool, tenant, ids, lengths, batch.lengths, batch.encoded, False)
    return DecoderCall(tenant, rows, None, found)


def _decode_one(
    devices: Devices,
    context: StepContext,
    caches: KVCacheManager,
    tenant: ReadyTenant,
    tokens: dict[int, int],
    layered: bool,
) -> DecoderCall:
    """One token more of a tenant's sequences, all of which are in its cache."""
    held, steps = caches.caches[tenant.name], context.loaded.steps(tenant)
    table: np.ndarray = devices.rows_given(held.table(tokens))
    rows = {number: held.row_of(number) for number in tokens}
    if layered:
        forward = steps.layered.decode(tenant, held.cache, table, held.encoded)
        return DecoderCall(tenant, rows, forward)
    pool = context.loaded.pool.leaves
    *found, held.cache = steps.decode(pool, tenant, held.cache, table, held.encoded)
    return DecoderCall(tenant, rows, None, tuple(found))
