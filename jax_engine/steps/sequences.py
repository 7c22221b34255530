"""Sequences on the device, and steps that advance any set of them.

A sequence reads its prompt, in one step or in several: after r of n tokens the encoder is through
floor(layers * r / n) of its layers for the whole prompt, since its attention looks both ways. Then
it has a place in its tenant's lane (`steps.lanes`) and takes one token a step. An answer that
was given before, and whose cache was given up, is put into the decoder at once, with the start
token, when all is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from common.dtypes import BY_NAME
from common.errors import EngineError
from common.families.switch_transformers import Side, SwitchTransformersConfig
from common.serving.backend import Observer, Part, Row, Step
from jax_engine.devices import Devices
from jax_engine.models.encoder_decoder import KeyValues
from jax_engine.steps.buckets import cache_bucket, prompt_bucket
from jax_engine.steps.compiled import Compiled
from jax_engine.steps.lanes import Form, Lane, LaneCalls, Room
from jax_engine.steps.layered import Pass
from jax_engine.tenants.loaded import Loaded
from jax_engine.tenants.ready import ReadyTenant

MOST_TOKENS = 2048
"""Tokens, padding included, that are read in one call: bounds its activations. A longer prompt is a
call of its own."""


@dataclass(eq=False)
class _Sequence:
    """A request on the device.

    read: how many of its unread tokens were. layers: of the encoder that were done. x: what came
    out of the last of them, [rows, S, H] with the prompt in row 0, while reading is not finished.
    hits, misses: of the step at hand.
    """

    number: int
    row: Row
    read: int = 0
    layers: int = 0
    x: jax.Array | None = None
    in_lane: bool = False
    hits: int = 0
    misses: int = 0

    def layers_after(self, read: int, layers: int) -> int:
        """How many of the encoder's layers are done when so many tokens are read."""
        prompt = len(self.row.prompt)
        return layers * min(read, prompt) // prompt


@dataclass(eq=False)
class _Prompts:
    """Prompts of one tenant in one call: row i of the arrays is sequence i's, the rest is padding.

    ids: int32 [B, S]; lengths: int32 [B]. encoded: what the decoder attends to, when all layers are
        done.
    """

    tenant: ReadyTenant
    sequences: list[_Sequence]
    ids: Any
    lengths: Any
    rows: int
    encoded: list[KeyValues] = field(default_factory=list)

    @property
    def prompts(self) -> list[int]:
        return [len(s.row.prompt) for s in self.sequences]


@dataclass(eq=False)
class _Answered:
    """A call of the decoder: the row of each sequence, and what came of it, winners [B], logits [B,
    V] and maybe what is to be kept; work: if it went layer by layer."""

    tenant: ReadyTenant
    rows: dict[int, int]
    work: Pass | None
    whole: tuple[Any, ...] = ()

    @property
    def found(self) -> tuple[Any, ...]:
        return self.whole if self.work is None else self.work.result


class Sequences:
    """All sequences and their caches; knows weights only as `Loaded` that is handed in."""

    def __init__(self, devices: Devices, compute: str, compiled: Compiled):
        """compute: type of activations and caches. room_bytes, the most that caches may take, is
        set by the caller."""
        self._devices, self._compute = devices, compute
        self._calls = LaneCalls(compiled, devices.by_row)
        self.room_bytes = 0
        self._sequences: dict[int, _Sequence] = {}
        self._lanes: dict[str, Lane] = {}
        self._begun = 0

    # Coming, going, room.

    def begin(self, row: Row) -> int:
        assert row.prompt, "a prompt has at least one token"
        self._begun += 1
        self._sequences[self._begun] = _Sequence(self._begun, row)
        return self._begun

    def end(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            sequence = self._sequences.pop(number, None)
            if sequence is None or sequence.row.tenant not in self._lanes:
                continue
            lane = self._lanes[sequence.row.tenant]
            lane.leave(number)
            if lane.is_empty:
                del self._lanes[sequence.row.tenant]

    def close(self) -> None:
        self.end(list(self._sequences))

    @property
    def tenants(self) -> set[str]:
        """Of all sequences."""
        return {s.row.tenant for s in self._sequences.values()}

    @property
    def used_bytes(self) -> int:
        """Of all caches, and of the encoder's states of prompts half read."""
        states = sum(s.x.nbytes for s in self._sequences.values() if s.x is not None)
        return states + sum(lane.nbytes for lane in self._lanes.values())

    def _form(self, config: SwitchTransformersConfig) -> Form:
        return Form(config.num_decoder_layers, config.num_heads, config.d_kv, self._compute)

    def _state_bytes(self, config: SwitchTransformersConfig, prompt: int) -> int:
        """Of the encoder's states of one prompt."""
        numbers = self._devices.rows(1) * prompt_bucket(prompt) * config.experts.hidden_size
        return int(numbers * BY_NAME[self._compute].itemsize)

    def alone_bytes(self, config: SwitchTransformersConfig, length: int) -> int:
        """What a sequence takes whose prompt and answer have so many tokens, if there is no
        other."""
        room = Room(self._devices.rows(1), cache_bucket(length), prompt_bucket(length))
        return self._form(config).nbytes(room) + self._state_bytes(config, length)

    def max_length(self, config: SwitchTransformersConfig) -> int:
        """Tokens of prompt and of answer that a sequence can have that has all the room, at most
        its context."""
        longest, length = 0, 1
        while (
            longest < config.max_positions and self.alone_bytes(config, length) <= self.room_bytes
        ):
            longest = prompt_bucket(length)
            length = longest + 1
        return min(longest, config.max_positions)

    def _needs(
        self, loaded: Loaded, parts: Sequence[Part], ahead: int = 0
    ) -> tuple[dict[str, Room], int]:
        """After a step of these parts: the least room of each lane, and bytes of states of prompts
        half read."""
        part_of = {p.sequence: p for p in parts}
        found: dict[str, tuple[int, int, int]] = {}
        states = 0
        for number, sequence in self._sequences.items():
            part, row = part_of.get(number), sequence.row
            if sequence.in_lane:
                length = self._lanes[row.tenant].length_of(number) + (part is not None)
            elif part is not None and sequence.read + part.read >= row.unread:
                length = 1 + len(row.answer)
            else:
                if part is not None or sequence.x is not None:
                    states += self._state_bytes(loaded.config(row.tenant), len(row.prompt))
                continue
            if part is not None:
                length = max(length, min(length + ahead, row.max_new_tokens))
            rows, cache, prompt = found.get(row.tenant, (0, 0, 0))
            found[row.tenant] = (rows + 1, max(cache, length), max(prompt, len(row.prompt)))
        rooms = {
            name: Room(self._devices.rows(rows), cache_bucket(cache), prompt_bucket(prompt))
            for name, (rows, cache, prompt) in found.items()
        }
        return rooms, states

    def _bytes(self, loaded: Loaded, rooms: Mapping[str, Room]) -> int:
        return sum(self._form(loaded.config(name)).nbytes(room) for name, room in rooms.items())

    def fits(self, loaded: Loaded, parts: Sequence[Part], ahead: int) -> bool:
        """See `Backend.fits`."""
        rooms, states = self._needs(loaded, parts, ahead)
        return states + self._bytes(loaded, rooms) <= self.room_bytes

    def _make_room(self, loaded: Loaded, parts: Sequence[Part]) -> dict[str, Room]:
        """The room of each lane in this step. Lanes that are there get it now, smaller ones
        first."""
        needed, states = self._needs(loaded, parts)
        # A step that failed may have left a lane that nothing is in.
        self._lanes = {name: lane for name, lane in self._lanes.items() if name in needed}
        rooms = needed | {name: lane.next_room(needed[name]) for name, lane in self._lanes.items()}
        if states + self._bytes(loaded, rooms) > self.room_bytes:
            rooms = needed
        for name, lane in sorted(
            self._lanes.items(), key=lambda item: item[1].form.nbytes(rooms[item[0]])
        ):
            lane.fit(rooms[name])
        return rooms

    # Steps.

    def step(self, loaded: Loaded, parts: Sequence[Part], observer: Observer | None) -> Step:
        """See `Backend.step`."""
        chosen = [self._sequences[p.sequence] for p in parts]
        for sequence, part in zip(chosen, parts, strict=True):
            left = sequence.row.unread - sequence.read
            if not (0 < part.read <= left if left else part.read == 0 <= part.token_id):
                raise EngineError(f"{part} does not fit a sequence with {left} unread tokens")
            sequence.hits = sequence.misses = 0
        tenants, seconds = loaded.ready.acquire(s.row.tenant for s in chosen)
        rooms = self._make_room(loaded, parts)
        reading = [(s, p.read) for s, p in zip(chosen, parts, strict=True) if p.read]
        prompts = self._read(loaded, tenants, reading, observer)
        tokens = {p.sequence: p.token_id for p in parts if not p.read}
        answered = self._answer(loaded, tenants, prompts, rooms, tokens, observer)
        winners = np.full(len(parts), -1, dtype=np.int64)
        logits: list[np.ndarray | None] = [None] * len(parts)
        for call in answered:
            found = np.asarray(call.found[0])
            for i, part in enumerate(parts):
                row = call.rows.get(part.sequence)
                if row is None:
                    continue
                winners[i] = found[row]
                if part.want_logits:
                    width = loaded.config(chosen[i].row.tenant).vocab_size
                    logits[i] = np.array(np.asarray(call.found[1])[row, :width], dtype=np.float32)
        hits, misses = (
            np.array([getattr(s, k) for s in chosen], dtype=np.int64) for k in ("hits", "misses")
        )
        loaded.pool.hits += int(hits.sum())
        loaded.pool.misses += int(misses.sum())
        return Step(winners, logits, hits, misses, seconds)

    def _is_layered(self, tenants: Iterable[ReadyTenant], observer: Observer | None) -> bool:
        """Whether a part of a step has to go layer by layer."""
        each = {t.name: t for t in tenants}
        return observer is not None or len(each) > 1 or any(t.can_miss for t in each.values())

    @staticmethod
    def _count(
        tenant: ReadyTenant,
        side: Side,
        layers: range,
        sequences: Iterable[tuple[_Sequence, int, int]],
        done: Pass | None,
    ) -> None:
        """Count look-ups of layers. sequences: with the row and the tokens of each. done: None if
        nothing can miss."""
        sparse = sum(n in layers for n in tenant.config.sparse_layers[side])
        for sequence, row, tokens in sequences:
            missed = 0 if done is None else int(done.misses[row])
            sequence.hits += sparse * tokens - missed
            sequence.misses += missed

    # Reading.

    def _prompts(self, tenant: ReadyTenant, sequences: list[_Sequence]) -> _Prompts:
        rows, width = (
            self._devices.rows(len(sequences)),
            prompt_bucket(max(len(s.row.prompt) for s in sequences)),
        )
        ids, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for i, sequence in enumerate(sequences):
            lengths[i] = len(sequence.row.prompt)
            ids[i, : lengths[i]] = sequence.row.prompt
        return _Prompts(
            tenant,
            sequences,
            self._devices.rows_given(ids),
            self._devices.rows_given(lengths),
            rows,
        )

    def _cut(self, sequences: list[_Sequence]) -> list[list[_Sequence]]:
        """Prompts that are read in one call, short ones first."""
        found: list[list[_Sequence]] = []
        for sequence in sorted(sequences, key=lambda s: len(s.row.prompt)):
            size = self._devices.rows(len(found[-1]) + 1 if found else 1) * prompt_bucket(
                len(sequence.row.prompt)
            )
            if found and size <= MOST_TOKENS:
                found[-1].append(sequence)
            else:
                found.append([sequence])
        return found

    def _read(
        self,
        loaded: Loaded,
        tenants: Mapping[str, ReadyTenant],
        reading: Sequence[tuple[_Sequence, int]],
        observer: Observer | None,
    ) -> list[_Prompts]:
        """Read so many tokens of each sequence. Returns those that have nothing left to read."""
        whole: dict[str, list[_Sequence]] = {}
        pieces: list[tuple[_Sequence, int]] = []
        for sequence, read in reading:
            if read == sequence.row.unread:
                whole.setdefault(sequence.row.tenant, []).append(sequence)
            else:
                pieces.append((sequence, read))
        calls = [
            self._prompts(tenants[name], some) for name in whole for some in self._cut(whole[name])
        ]
        if not self._is_layered((tenants[s.row.tenant] for s, _ in reading), observer):
            for call in calls:
                call.encoded = loaded.steps(call.tenant).encode(
                    loaded.pool.leaves, call.tenant, call.ids, call.lengths
                )
        passes = {
            call: loaded.steps(call.tenant).layered.encode(
                call.tenant, call.ids, call.lengths, call.rows
            )
            for call in calls
            if not call.encoded
        }
        parts: dict[_Prompts, range] = {}
        for sequence, read in pieces:
            tenant = tenants[sequence.row.tenant]
            layers = range(
                sequence.layers,
                sequence.layers_after(sequence.read + read, tenant.config.num_layers),
            )
            call = self._prompts(tenant, [sequence])
            parts[call] = layers
            if layers:
                passes[call] = loaded.steps(tenant).layered.encode(
                    tenant,
                    call.ids,
                    call.lengths,
                    call.rows,
                    x=sequence.x,
                    first=layers.start,
                    last=layers.stop,
                )
        loaded.experts.run(passes.values(), loaded.pool, loaded.residuals, observer)
        for call in [*calls, *parts]:
            done, (first, *_) = passes.get(call), call.sequences
            layers = parts.get(call, range(call.tenant.config.num_layers))
            each = [(s, i, len(s.row.prompt)) for i, s in enumerate(call.sequences)]
            self._count(call.tenant, "encoder", layers, each, done)
            if call in parts and done is not None:
                first.x, first.layers = done.result, layers.stop
        for sequence, read in reading:
            sequence.read += read
        finished = [
            call
            for call in [*calls, *parts]
            if call.sequences[0].read == call.sequences[0].row.unread
        ]
        for call in finished:
            if not call.encoded:
                x: Any = passes[call].result if call in passes else call.sequences[0].x
                call.encoded = loaded.steps(call.tenant).layered.end_encoder(call.tenant, x)
                call.sequences[0].x = None
        return finished

    # Answering.

    def _enter(
        self, prompts: Sequence[_Prompts], rooms: Mapping[str, Room]
    ) -> dict[_Prompts, np.ndarray]:
        """Give prompts that are read places in the lanes: int32 [sequences] each."""
        places: dict[_Prompts, np.ndarray] = {}
        for call in prompts:
            name = call.tenant.name
            room = rooms[name]
            if name not in self._lanes:
                self._lanes[name] = Lane(self._form(call.tenant.config), self._calls)
            lane = self._lanes[name]
            _, _, width, _ = call.encoded[0][0].shape
            own = lane.is_empty and (call.rows, width) == (room.rows, room.prompt)
            if own:
                lane.take_over(call.encoded, room.cache)
            else:
                lane.fit(room)
            places[call] = lane.enter([s.number for s in call.sequences], call.prompts)
            for sequence in call.sequences:
                sequence.in_lane = True
            if not own:
                lane.put("encoded", call.encoded, places[call])
        return places

    def _answers(self, loaded: Loaded, call: _Prompts) -> tuple[Any, Any]:
        """What the decoder reads of sequences that answered before: ids int32 [B, T] and lengths
        int32 [B]."""
        rows = [(loaded.start_ids[s.row.tenant], *s.row.answer) for s in call.sequences]
        return self._padded(rows, call.rows)

    def _padded(self, rows: Sequence[Sequence[int]], count: int) -> tuple[Any, Any]:
        ids = np.zeros((count, prompt_bucket(max(map(len, rows)))), np.int32)
        lengths = np.zeros(count, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], lengths[i] = row, len(row)
        return self._devices.rows_given(ids), self._devices.rows_given(lengths)

    def _answer(
        self,
        loaded: Loaded,
        tenants: Mapping[str, ReadyTenant],
        prompts: Sequence[_Prompts],
        rooms: Mapping[str, Room],
        tokens: dict[int, int],
        observer: Observer | None,
    ) -> list[_Answered]:
        """One token more for sequences that answer (tokens: number -> the last one), and for those
        just read."""
        places = self._enter(prompts, rooms)
        again = [call for call in prompts if any(s.row.answer for s in call.sequences)]
        for call in prompts:
            if call not in again:
                tokens = tokens | {
                    s.number: loaded.start_ids[call.tenant.name] for s in call.sequences
                }
        of_lane: dict[str, dict[int, int]] = {}
        for number, token in tokens.items():
            of_lane.setdefault(self._sequences[number].row.tenant, {})[number] = token
        layered = self._is_layered(
            [*(c.tenant for c in again), *(tenants[n] for n in of_lane)], observer
        )
        pool = loaded.pool.leaves
        calls: list[_Answered] = []
        for call in again:
            steps = loaded.steps(call.tenant)
            ids, lengths = self._answers(loaded, call)
            rows = {s.number: i for i, s in enumerate(call.sequences)}
            if layered:
                work = steps.layered.answer(
                    call.tenant, ids, lengths, call.lengths, call.encoded, False
                )
                calls.append(_Answered(call.tenant, rows, work))
            else:
                found = steps.answer(
                    pool, call.tenant, ids, lengths, call.lengths, call.encoded, False
                )
                calls.append(_Answered(call.tenant, rows, None, found))
        for name, some in of_lane.items():
            tenant, lane = tenants[name], self._lanes[name]
            steps, table = loaded.steps(tenant), self._devices.rows_given(lane.rows(some))
            rows = {number: lane.place_of(number) for number in some}
            if layered:
                calls.append(
                    _Answered(
                        tenant, rows, steps.layered.decode(tenant, lane.cache, table, lane.encoded)
                    )
                )
            else:
                *given, lane.cache = steps.decode(pool, tenant, lane.cache, table, lane.encoded)
                calls.append(_Answered(tenant, rows, None, tuple(given)))
        loaded.experts.run(
            [c.work for c in calls if c.work], loaded.pool, loaded.residuals, observer
        )
        for answered in calls:
            each = [self._sequences[number] for number in answered.rows]
            taken = [
                (s, row, 1 + len(s.row.answer) if s.number not in tokens else 1)
                for s, row in zip(each, answered.rows.values(), strict=True)
            ]
            self._count(
                answered.tenant,
                "decoder",
                range(answered.tenant.config.num_decoder_layers),
                taken,
                answered.work,
            )
            lane = self._lanes[answered.tenant.name]
            for sequence, _, count in taken:
                lane.add(sequence.number, count)
        for call, answered in zip(again, calls, strict=False):
            self._lanes[call.tenant.name].put("cache", answered.found[2], places[call])
        return calls

    # Scoring.

    def logits(
        self,
        loaded: Loaded,
        name: str,
        rows: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]],
        observer: Observer | None,
    ) -> list[np.ndarray]:
        """Of every row float32 [tokens, vocab] at every position of given answers. Keeps
        nothing."""
        tenant = loaded.ready.acquire([name])[0][name]
        found: list[np.ndarray] = []
        size = max(1, MOST_TOKENS // prompt_bucket(max(len(r) for r in [*rows, *decoder_rows])))
        for start in range(0, len(rows), size):
            answers = decoder_rows[start : start + size]
            sequences = [_Sequence(0, Row(name, tuple(r), 1)) for r in rows[start : start + size]]
            call = self._prompts(tenant, sequences)
            ids, lengths = self._padded(answers, call.rows)
            steps, pool = loaded.steps(tenant), loaded.pool.leaves
            if self._is_layered([tenant], observer):
                layered = steps.layered
                work = layered.encode(tenant, call.ids, call.lengths, call.rows)
                loaded.experts.run([work], loaded.pool, loaded.residuals, observer)
                encoded = layered.end_encoder(tenant, work.result)
                work = layered.answer(tenant, ids, lengths, call.lengths, encoded, True)
                loaded.experts.run([work], loaded.pool, loaded.residuals, observer)
                values = work.result[1]
            else:
                encoded = steps.encode(pool, tenant, call.ids, call.lengths)
                values = steps.answer(pool, tenant, ids, lengths, call.lengths, encoded, True)[1]
            whole = np.asarray(values, dtype=np.float32)
            found += [whole[i, : len(r), : tenant.config.vocab_size] for i, r in enumerate(answers)]
        return found
