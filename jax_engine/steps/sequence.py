"""A sequence on the device, and prompts of several that are read in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from common.serving.backend import Observer, Row
from jax_engine.devices import Devices
from jax_engine.layers.attention import KeyValues
from jax_engine.steps.buckets import prompt_bucket
from jax_engine.steps.layered import Forward
from jax_engine.tenants.loaded_store import LoadedStore
from jax_engine.tenants.ready import ReadyTenant


@dataclass(eq=False)
class SequenceState:
    """One request's tokens on the device.

    read: how many of its unread tokens were. layers: of the encoder that were done.
    x: what came out of the last of them, [rows, S, H] with the prompt in row 0, while reading is
        not finished.
    is_cached: whether it has a row in its tenant's KV cache.
    hits, misses: of the step at hand.
    """

    number: int
    row: Row
    read: int = 0
    layers: int = 0
    x: jax.Array | None = None
    is_cached: bool = False
    hits: int = 0
    misses: int = 0

    def layers_after(self, read: int, layers: int) -> int:
        """How many of the encoder's layers are done when so many tokens are read."""
        prompt = len(self.row.prompt)
        return layers * min(read, prompt) // prompt


@dataclass(frozen=True)
class StepContext:
    """What a step works with: the weights, its tenants' among them, and who looks on."""

    loaded: LoadedStore
    tenants: Mapping[str, ReadyTenant]
    observer: Observer | None

    def is_layered(self, names: set[str]) -> bool:
        """Whether what these tenants compute together has to go layer by layer."""
        can_miss = any(self.tenants[name].can_miss for name in names)
        return self.observer is not None or len(names) > 1 or can_miss

    def run(self, forwards: Sequence[Forward]) -> None:
        """Bring forwards to their ends, side by side."""
        loaded = self.loaded
        loaded.expert_runner.run(forwards, loaded.pool, loaded.residuals, self.observer)


@dataclass(eq=False)
class PromptBatch:
    """Prompts of one tenant in one call: row i of the arrays is sequence i's, the rest is padding.

    ids: int32 [B, S]. lengths: int32 [B].
    encoded: what the decoder attends to, when all layers are done.
    """

    tenant: ReadyTenant
    sequences: list[SequenceState]
    ids: Any
    lengths: Any
    encoded: list[KeyValues] = field(default_factory=list)

    @classmethod
    def of(
        cls, devices: Devices, tenant: ReadyTenant, sequences: list[SequenceState]
    ) -> PromptBatch:
        rows = devices.rows(len(sequences))
        ids, lengths = padded(devices, [s.row.prompt for s in sequences], rows)
        return cls(tenant, sequences, ids, lengths)

    @property
    def rows(self) -> int:
        """Rows of the arrays."""
        return len(self.ids)

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(s.row.prompt) for s in self.sequences]


def padded(devices: Devices, rows: Sequence[Sequence[int]], count: int) -> tuple[Any, Any]:
    """Rows of ids as int32 [count, bucket], and their lengths int32 [count]."""
    ids = np.zeros((count, prompt_bucket(max(map(len, rows)))), np.int32)
    lengths = np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], lengths[i] = row, len(row)
    return devices.rows_given(ids), devices.rows_given(lengths)


def count_look_ups(
    tenant: ReadyTenant,
    layers: range,
    sequences: Sequence[tuple[SequenceState, int, int]],
    done: Forward | None,
) -> None:
    """Count a call's look-ups of experts.

    Args:
        layers: that the call went through, among all layers.
        sequences: with the row and the tokens of each.
        done: None if nothing can miss.
    """
    sparse = sum(n in layers for n in tenant.config.shape.sparse_layers)
    for sequence, row, tokens in sequences:
        missed = 0 if done is None else int(done.misses[row])
        sequence.hits += sparse * tokens - missed
        sequence.misses += missed
