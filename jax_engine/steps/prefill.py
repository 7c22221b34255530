"""Reading prompts, in one step or in several.

After r of n tokens the encoder is through floor(layers * r / n) of its layers for the whole prompt,
since its attention looks both ways.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax_engine.devices import Devices
from jax_engine.steps.buckets import prompt_bucket
from jax_engine.steps.layered import Forward
from jax_engine.steps.sequence import PromptBatch, SequenceState, StepContext, count_look_ups

MOST_TOKENS = 2048
"""Tokens, padding included, that are read in one call: bounds its activations. A longer prompt is a
call of its own."""


def prefill(
    devices: Devices, context: StepContext, reading: Sequence[tuple[SequenceState, int]]
) -> list[PromptBatch]:
    """Read so many tokens of each sequence.

    Returns:
        Those that have nothing left to read, encoded.
    """
    whole: dict[str, list[SequenceState]] = {}
    pieces: list[tuple[SequenceState, int]] = []
    for sequence, read in reading:
        if read == sequence.row.unread:
            whole.setdefault(sequence.row.tenant, []).append(sequence)
        else:
            pieces.append((sequence, read))
    batches = [
        PromptBatch.of(devices, context.tenants[name], some)
        for name in whole
        for some in _cut(devices, whole[name])
    ]
    forwards: dict[PromptBatch, Forward] = {}
    layered = context.is_layered({s.row.tenant for s, _ in reading})
    for batch in batches:
        steps = context.loaded.steps(batch.tenant)
        if layered:
            forwards[batch] = steps.layered.encode(batch.tenant, batch.ids, batch.lengths)
        else:
            batch.encoded = steps.encode(
                context.loaded.pool.leaves, batch.tenant, batch.ids, batch.lengths
            )
    layers_of = {batch: range(_encoder_layers(batch)) for batch in batches}
    for sequence, read in pieces:
        batch = PromptBatch.of(devices, context.tenants[sequence.row.tenant], [sequence])
        stop = sequence.layers_after(sequence.read + read, _encoder_layers(batch))
        layers_of[batch] = range(sequence.layers, stop)
        if layers_of[batch]:
            forwards[batch] = context.loaded.steps(batch.tenant).layered.encode(
                batch.tenant,
                batch.ids,
                batch.lengths,
                x=sequence.x,
                first=sequence.layers,
                last=stop,
            )
    context.run(list(forwards.values()))
    for batch, layers in layers_of.items():
        done, first = forwards.get(batch), batch.sequences[0]
        each = [(s, i, len(s.row.prompt)) for i, s in enumerate(batch.sequences)]
        count_look_ups(batch.tenant, layers, each, done)
        if done is not None:
            first.x, first.layers = done.result, layers.stop
    for sequence, read in reading:
        sequence.read += read
    return [_finish(context, batch) for batch in layers_of if _is_read(batch)]


def _encoder_layers(batch: PromptBatch) -> int:
    return batch.tenant.architecture.spec.first_of_decoder


def _is_read(batch: PromptBatch) -> bool:
    first = batch.sequences[0]
    return first.read == first.row.unread


def _finish(context: StepContext, batch: PromptBatch) -> PromptBatch:
    """Encode a batch that went layer by layer: the states that are kept in its first sequence."""
    first = batch.sequences[0]
    if not batch.encoded:
        assert first.x is not None
        layered = context.loaded.steps(batch.tenant).layered
        batch.encoded, first.x = layered.end_encoder(batch.tenant, first.x), None
    return batch


def _cut(devices: Devices, sequences: list[SequenceState]) -> list[list[SequenceState]]:
    """Prompts that are read in one call, short ones first."""
    found: list[list[SequenceState]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.row.prompt)):
        rows = devices.rows(len(found[-1]) + 1 if found else 1)
        if found and rows * prompt_bucket(len(sequence.row.prompt)) <= MOST_TOKENS:
            found[-1].append(sequence)
        else:
            found.append([sequence])
    return found
