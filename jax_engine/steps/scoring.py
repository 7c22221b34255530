"""Logits of given answers, at every position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.serving.backend import Observer, Row
from jax_engine.devices import Devices
from jax_engine.steps.buckets import prompt_bucket
from jax_engine.steps.prefill import MOST_TOKENS
from jax_engine.steps.sequence import PromptBatch, SequenceState, StepContext, padded
from jax_engine.tenants.loaded_store import LoadedStore


def score(
    devices: Devices,
    loaded: LoadedStore,
    name: str,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    observer: Observer | None,
) -> list[np.ndarray]:
    """Of every answer float32 [tokens, vocab]. Keeps nothing."""
    tenants = loaded.ready.acquire([name])[0]
    tenant, context = tenants[name], StepContext(loaded, tenants, observer)
    steps, pool = loaded.steps(tenant), loaded.pool.leaves
    found: list[np.ndarray] = []
    size = max(1, MOST_TOKENS // prompt_bucket(max(map(len, [*prompts, *answers]))))
    for start in range(0, len(prompts), size):
        some = [SequenceState(0, Row(name, tuple(r), 1)) for r in prompts[start : start + size]]
        batch = PromptBatch.of(devices, tenant, some)
        wanted = answers[start : start + size]
        ids, lengths = padded(devices, wanted, batch.rows)
        if context.is_layered({name}):
            forward = steps.layered.encode(tenant, batch.ids, batch.lengths)
            context.run([forward])
            encoded = steps.layered.end_encoder(tenant, forward.result)
            forward = steps.layered.answer(tenant, ids, lengths, batch.lengths, encoded, True)
            context.run([forward])
            values = forward.result[1]
        else:
            encoded = steps.encode(pool, tenant, batch.ids, batch.lengths)
            values = steps.answer(pool, tenant, ids, lengths, batch.lengths, encoded, True)[1]
        whole = np.asarray(values, dtype=np.float32)
        width = tenant.config.vocab_size
        found += [whole[i, : len(r), :width] for i, r in enumerate(wanted)]
    return found
