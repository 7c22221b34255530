"""Residuals on the device: packed as they are in the store, once for all tenants, and their
products in XLA.

A layer has one flat array of all tenants' records. Which of them a slot has, for the tenant at
hand, is in a table of
a shape that no tenant changes, read while the step runs: a tenant switch passes another table to
the same call. A slot holds one expert, so (tenant, layer, slot) determines the record. Where tokens
of several tenants go through a layer together, the tables of all tenants lie one after the other,
and each token says which of their rows is its own.

The products here take any device, and the records as they are in the store. They expand `SIGN_ROWS`
rows of sign codes, or `LOW_RANK_ROWS` components, at a time, and go through as many of them as the
slot's own parts have: nothing is padded to the largest tenant's. Padding is room for one such group
behind a layer's last record: at d_ff 3072, 12 KiB for sign parts, 24 KiB for low rank in 4 bits.

On one CPU device the kernels of `jax_engine.native` do all this. For them the bits of sign parts
are laid out in blocks of 64 outputs, as the weights that they correct are (`blocked_part`); padding
is that of outputs to a multiple of 64.

Legend: tokens T, inputs K, outputs N of a projection, slots S, rank R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from common.errors import EngineError
from common.kernels.packed_weights import (
    ALIGNMENT,
    BLOCK,
    FIELDS,
    KINDS,
    NONE,
    blocked_part,
    part_fields,
)
from common.plan.residual import LOW_RANK, SIGN, Part, row_bytes
from common.store import Store

Array = jax.Array

SIGN_ROWS = 32
LOW_RANK_ROWS = 16
"""Rows that are expanded at once: some hundred KiB of float32 at Switch's widths, so that they stay
in a cache."""

MOST_WORDS = 2**31 - 1
"""Words of a layer: jax counts in int32."""

Form = tuple[str, int]
"""What decides how a part is expanded: kind, bits."""


@dataclass(frozen=True)
class LayerResiduals:
    """What one tenant adds to the copies of one layer.

    words: uint32 [words], the records of all tenants, little endian, and room behind them so that
        reading the last rows in whole groups stays inside.
    table: int32 [S, projections, parts, FIELDS] of this tenant, or of all tenants, S rows each;
        `NONE` behind a slot's last part.
    forms: for each projection, the forms that some tenant has in this layer; what is compiled.
    """

    words: Array
    table: Array
    forms: tuple[tuple[Form, ...], ...]

    def product(self, x: Array, slot: Array, projection: int, outputs: int) -> Array | None:
        """What the residual of a slot adds to a projection: [T, K] -> float32 [T, N]. None: no
        tenant has any here.

        slot: int32 [], projection: its number in the family's order.
        """
        forms = self.forms[projection]
        if not forms:
            return None
        wide = x.astype(jnp.float32)
        width = -(-outputs // SIGN_ROWS) * SIGN_ROWS
        parts = self.table[slot, projection]
        kinds = jnp.array([KINDS[kind] for kind, _ in forms], jnp.int32)
        bits = jnp.array([bits for _, bits in forms], jnp.int32)

        def of(form: Form) -> Callable[[Array, Array, Array], Array]:
            kind, bits = form
            if kind == SIGN:
                return lambda out, size, starts: _add_sign(
                    self.words, wide, out, outputs, size, starts[0]
                )
            return lambda out, size, starts: _add_low_rank(
                self.words, wide, out, outputs, size, starts, bits
            )

        branches = [*map(of, forms), lambda out, size, starts: out]

        def add(i: Array, out: Array) -> Array:
            kind, width, size = parts[i, :3]
            found = (kinds == kind) & (bits == width)
            chosen = jnp.where(found.any(), jnp.argmax(found), len(forms))
            added: Array = lax.switch(chosen, branches, out, size, parts[i, 3:])
            return added

        count = (parts[:, 0] != NONE).sum()
        added: Array = lax.fori_loop(0, count, add, jnp.zeros_like(wide, shape=(x.shape[0], width)))
        return added[:, :outputs]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes


jax.tree_util.register_dataclass(
    LayerResiduals, data_fields=["words", "table"], meta_fields=["forms"]
)

Residuals = tuple[LayerResiduals | None, ...]
"""One for each sparse layer, None where no tenant has any; empty for a plan without residuals."""


def _row_words(count: int, bits: int) -> int:
    return row_bytes(count, bits) // 4


def _codes(words: Array, bits: int, count: int) -> Array:
    """uint32 [rows, words], up to 8 bits a code -> uint32 [rows, count]."""
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)
    codes: Array = (words[:, :, None] >> shifts) & jnp.uint32((1 << bits) - 1)
    return codes.reshape(len(words), -1)[:, :count]


def _numbers(words: Array, bits: int, count: int) -> Array:
    """uint32 [rows, words] of a low-rank part -> the numbers that they stand for, float32 [rows,
    count]."""
    numbers: Array
    if bits <= 8:
        numbers = _codes(words, bits, count).astype(jnp.float32) - jnp.float32((2**bits - 1) / 2)
    else:
        stored = lax.bitcast_convert_type(words, jnp.float16 if bits == 16 else jnp.float32)
        numbers = stored.reshape(len(words), -1)[:, :count].astype(jnp.float32)
    return numbers


def _rows(words: Array, start: Array, rows: int, width: int) -> Array:
    return lax.dynamic_slice_in_dim(words, start, rows * width).reshape(rows, width)


def _add_sign(words: Array, x: Array, out: Array, outputs: int, size: Array, start: Array) -> Array:
    """out [T, N up to a multiple of SIGN_ROWS] + x times a sign part that begins at `start`; junk
    behind column N."""
    inputs = x.shape[1]
    width = _row_words(inputs, 1)
    first = start + (-(-outputs // size) + 1) // 2

    def group(i: Array, out: Array) -> Array:
        row = i * SIGN_ROWS
        signs = (
            _codes(_rows(words, first + row * width, SIGN_ROWS, width), 1, inputs).astype(
                jnp.float32
            )
            * 2
            - 1
        )
        scale_of = (row + jnp.arange(SIGN_ROWS)) // size
        pair = words.at[start + scale_of // 2].get(mode="clip")
        upper = jnp.where(
            scale_of % 2 == 0, pair << 16, pair & jnp.uint32(0xFFFF0000)
        )  # bfloat16 as float32
        found = jnp.einsum("tk,nk->tn", x, signs) * lax.bitcast_convert_type(upper, jnp.float32)
        old = lax.dynamic_slice_in_dim(out, row, SIGN_ROWS, axis=1)
        return lax.dynamic_update_slice_in_dim(out, old + found, row, axis=1)

    added: Array = lax.fori_loop(0, -(-outputs // SIGN_ROWS), group, out)
    return added


def _add_low_rank(
    words: Array, x: Array, out: Array, outputs: int, rank: Array, starts: Array, bits: int
) -> Array:
    """out [T, N and more] + x times a low-rank part. starts: int32 [3], of it, its v and its u."""
    inputs = x.shape[1]
    of_v, of_u = _row_words(inputs, bits), _row_words(outputs, bits)
    start, first_v, first_u = starts

    def group(i: Array, out: Array) -> Array:
        row = i * LOW_RANK_ROWS
        there = (
            row + jnp.arange(LOW_RANK_ROWS) < rank
        )  # what follows the last component may be anything, NaN too
        scale = lax.bitcast_convert_type(
            lax.dynamic_slice_in_dim(words, start + row, LOW_RANK_ROWS), jnp.float32
        )
        v = _numbers(_rows(words, first_v + row * of_v, LOW_RANK_ROWS, of_v), bits, inputs)
        u = _numbers(_rows(words, first_u + row * of_u, LOW_RANK_ROWS, of_u), bits, outputs)
        inner = jnp.where(there, jnp.einsum("tk,rk->tr", x, v) * scale, 0)
        found = jnp.einsum("tr,rn->tn", inner, jnp.where(there[:, None], u, 0))
        return out + jnp.pad(found, [(0, 0), (0, out.shape[1] - outputs)])

    added: Array = lax.fori_loop(0, -(-rank // LOW_RANK_ROWS), group, out)
    return added


def part_on_device(
    data: np.ndarray, part: Part, shape: tuple[int, ...], blocked: bool
) -> np.ndarray:
    """A part that begins at data[0] as it lies on the device: uint8 [bytes, a multiple of 16]."""
    data = data[: part.nbytes(shape)]
    if blocked:
        return blocked_part(data, part.kind, part.size, shape)
    return np.concatenate([data, np.zeros(-len(data) % ALIGNMENT, dtype=np.uint8)])


def _part_bytes(part: Part, shape: tuple[int, ...], blocked: bool) -> int:
    """Of what `part_on_device` gives."""
    count = part.nbytes(shape)
    if blocked and part.kind == SIGN:
        outputs, inputs = shape
        count = row_bytes(-(-outputs // part.size), 16) + -(-outputs // BLOCK) * inputs * 8
    return -(-count // ALIGNMENT) * ALIGNMENT


class LoadedResiduals:
    """All tenants' residuals on the device, and each tenant's tables."""

    def __init__(
        self,
        store: Store,
        slot_of: np.ndarray,
        slots: Sequence[int],
        put: Callable[[Any], Array],
        blocked: bool,
        before: LoadedResiduals | None = None,
    ):
        """slot_of: int32 [tenants, layers, experts], as `slots_of_plan` gives it; slots: of each
        layer's tables.

        blocked: laid out for our own kernels, else for XLA. before: of the store's last state;
        layers whose records are the same are taken over. Raises EngineError for more than 8 GiB of
        one layer, CheckpointError for a file of another size than the plan tells.
        """
        plan, spec = store.plan, store.experts
        self._put = put
        shapes = dict(spec.projections)
        names = list(shapes)
        of_layer = [
            [i for i, r in enumerate(plan.residuals) if r.layer == n]
            for n in range(plan.num_layers)
        ]
        self._words: list[Array | None] = []
        self._tables: list[np.ndarray | None] = []
        self._forms: list[tuple[tuple[Form, ...], ...]] = []
        self._contents: list[tuple[Any, ...]] = []
        self._joint: dict[int, LayerResiduals | None] = {}
        for layer, numbers in enumerate(of_layer):
            residuals = [plan.residuals[i] for i in numbers]
            self._contents.append(
                tuple((store.residual_ref(i).file_tensor, plan.residuals[i].parts) for i in numbers)
            )
            same = before is not None and before._contents[layer] == self._contents[layer]
            forms = tuple(
                tuple(
                    sorted(
                        {
                            (p.kind, p.bits)
                            for r in residuals
                            for p in r.parts
                            if p.projection == name
                        }
                    )
                )
                for name, _ in spec.projections
            )
            self._forms.append(forms)
            if not residuals:
                self._words.append(None)
                self._tables.append(None)
                continue
            pieces: list[np.ndarray] = []
            words = 0
            rows: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
            for i, residual in zip(numbers, residuals, strict=True):
                record = np.zeros(0, np.uint8) if same else store.residual_ref(i).map()
                slot = int(slot_of[residual.tenant, layer, residual.expert])
                starts: list[int] = []
                for part, offset in zip(residual.parts, residual.offsets(shapes), strict=False):
                    starts.append(words)
                    inputs = shapes[part.projection][1]
                    fields = part_fields(part.kind, part.bits, part.size, inputs, starts, part.like)
                    rows.setdefault(
                        (residual.tenant, slot, names.index(part.projection)), []
                    ).append(fields)
                    if not same:
                        pieces.append(
                            part_on_device(record[offset:], part, shapes[part.projection], blocked)
                        )
                    words += _part_bytes(part, shapes[part.projection], blocked) // 4
            if not blocked:
                room = max(_room(f, shape) for f, shape in zip(forms, shapes.values(), strict=True))
                pieces.append(np.zeros(4 * room, dtype=np.uint8))
                words += room
            if words > MOST_WORDS:
                raise EngineError(
                    f"the residuals of layer {layer} have {4 * words} bytes; the jax engine takes "
                    "up to "
                    f"{4 * MOST_WORDS} a layer: plan with a smaller budget"
                )
            taken = before._words[layer] if same and before is not None else None
            self._words.append(
                put(np.concatenate(pieces).view(np.uint32)) if taken is None else taken
            )
            most = max(map(len, rows.values()))
            table = np.zeros(
                (len(plan.tenants), slots[layer], len(names), most, FIELDS), dtype=np.int32
            )
            for place, found in rows.items():
                table[place][: len(found)] = found
            self._tables.append(table)

    def of(self, tenant: int) -> Residuals:
        """A tenant's, its tables put on the device; the records are not copied."""
        if all(words is None for words in self._words):
            return ()
        return tuple(
            None
            if words is None or tables is None
            else LayerResiduals(words, self._put(tables[tenant]), forms)
            for words, tables, forms in zip(self._words, self._tables, self._forms, strict=True)
        )

    def joint(self, layer: int) -> LayerResiduals | None:
        """All tenants' of a layer: row tenant * S + slot of the table. Tenants are padded to a
        power of two."""
        if layer not in self._joint:
            words, tables = self._words[layer], self._tables[layer]
            if words is None or tables is None:
                self._joint[layer] = None
            else:
                tenants, slots = tables.shape[:2]
                rows = np.zeros(
                    ((1 << (tenants - 1).bit_length()) * slots, *tables.shape[2:]), dtype=np.int32
                )
                rows[: tenants * slots] = tables.reshape(tenants * slots, *tables.shape[2:])
                self._joint[layer] = LayerResiduals(words, self._put(rows), self._forms[layer])
        return self._joint[layer]

    @property
    def device_bytes(self) -> int:
        """Bytes of all records, and of the room behind them for XLA; a mesh has them on every
        device."""
        return sum(words.nbytes for words in self._words if words is not None)

    def close(self) -> None:
        self._words.clear()
        self._tables.clear()
        self._joint.clear()


def _room(forms: Sequence[Form], shape: tuple[int, ...]) -> int:
    """Words that `product` may read behind the last part of a projection."""
    outputs, inputs = shape
    rows = {SIGN: SIGN_ROWS, LOW_RANK: LOW_RANK_ROWS}
    return max(
        (rows[kind] * max(_row_words(n, bits) for n in (inputs, outputs)) for kind, bits in forms),
        default=0,
    )
