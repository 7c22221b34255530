"""The expert pool: resident copies in slots, spare slots for misses, and the products that go
through them.

Legend: tokens T, experts E, top_k K, slots S of one layer, hidden H, intermediate I.
A look-up table a layer, `keys[tenant, expert]`, turns routing into keys at once: a key below S is a
slot; one from S on says which tenant's own expert to fetch (S + tenant * E + expert).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.checkpoints import TensorRef
from common.plan.plan import MISS, Plan
from common.store import Store
from torch_engine import native
from torch_engine.layers.mlp import ACTIVATIONS
from torch_engine.products import PackedWeight, Weight, as_tensor, linear, pack_native
from torch_engine.residuals import ResidentResiduals, RowResidual, add_residuals, residuals_within


@dataclass
class PoolCounts:
    """Look-ups since the engine was loaded.

    fetches: misses that were not in a spare slot; prefetches: experts brought before anybody missed
        them;
    fetched_bytes: what both moved.
    """

    hits: int = 0
    misses: int = 0
    fetches: int = 0
    prefetches: int = 0
    fetched_bytes: int = 0


@dataclass(frozen=True)
class TokenTenants:
    """The tenant of each token. ids: int64 [T] on the host; single: the tenant's index if it is one
    for all."""

    ids: np.ndarray
    single: int | None


class _Plan:
    """What a pool knows of a plan beside the weights of its copies.

    can_miss: bool [layers, tenants]; where none can, nothing has to be counted or waited for.
    """

    def __init__(self, store: Store, device: torch.device, kernels: native.Kernels | None):
        self.store = store
        self.slots_of_layer, self.keys = _key_tables(store.plan)
        self.can_miss = np.array(
            [(k >= len(s)).any(axis=1) for k, s in zip(self.keys, self.slots_of_layer, strict=True)]
        )
        self.residuals = ResidentResiduals(store, device, kernels)
        # Mapped now, so that a damaged store is found before the first request, and a replaced one
        # does no harm.
        self.missing = {
            (int(tenant), int(layer), int(expert)): _mapped(
                store.copy_refs(store.tenants[tenant], int(layer), int(expert))
            )
            for tenant, layer, expert in np.argwhere(store.plan.serving == MISS)
        }


class ExpertPool(ABC):
    """Resident copies of every layer on one device."""

    def __init__(
        self,
        store: Store,
        dtype: torch.dtype,
        device: torch.device,
        spare_slots: int,
        kernels: native.Kernels | None = None,
    ):
        """kernels: our own, for the products of residuals, where they are used."""
        self.dtype, self.device = dtype, device
        spec = store.experts
        self.top_k = spec.top_k
        self.spare_slots = spare_slots
        self.counts = PoolCounts()
        self.activation = ACTIVATIONS[spec.activation]
        self.copy_bytes = spec.copy_elements * dtype.itemsize
        self._kernels = kernels
        self._take_plan(_Plan(store, device, kernels))

    def _take_plan(self, made: _Plan) -> None:
        self.store, self.plan = made.store, made.store.plan
        self.slots_of_layer, self.keys = made.slots_of_layer, made.keys
        self.can_miss = made.can_miss
        self.residuals = made.residuals
        self._missing = made.missing

    @abstractmethod
    def update(self, store: Store) -> None:
        """Hold what another store's plan says. Copies that are here already stay; nothing changes
        if this raises."""

    @abstractmethod
    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        tenants: TokenTenants,
        misses: np.ndarray,
    ) -> Tensor:
        """The weighted sum of each token's experts.

        x: [T, H]; expert_ids: int64 [T, K]; weights: float32 [T, K], as routed. misses: int64 [T],
            added to.
        """

    def expect(self, tenant: int) -> None:  # noqa: B027 (a hint; doing nothing is right)
        """A tenant (its index) is about to enter: bring what it will miss, while others compute."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Bytes of resident copies and of filled spare slots."""

    @property
    def residual_bytes(self) -> int:
        """Bytes of all residuals, which `device_bytes` leaves out."""
        return self.residuals.nbytes

    @property
    @abstractmethod
    def spare_filled(self) -> int:
        """Number of spare slots that hold a missing expert now."""

    def _missed(self, layer: int, key: int) -> dict[str, Tensor]:
        """The tenant's own matrices that a miss key names."""
        tenant, expert = divmod(key - len(self.slots_of_layer[layer]), self.plan.num_experts)
        return self._missing[tenant, layer, expert]

    def _numbers(self, layer: int, ids: np.ndarray, tenants: TokenTenants) -> np.ndarray | None:
        """Which residual each row of routing has, int64 [T, K], 0 for none; None if no tenant has
        any in this layer."""
        if not self.residuals.among(layer, tenants.ids, tenants.single):
            return None
        return _looked_up(self.residuals.numbers[layer], ids, tenants)

    def _row_residuals(self, numbers: np.ndarray, both: np.ndarray) -> list[RowResidual]:
        """Runs of rows with a residual. numbers: int64 [rows]; both: int64 [rows], sorted, equal in
        a run."""
        starts = [start for _, start, _ in _groups(both)]
        return self.residuals.rows(
            list(zip(numbers[starts].tolist(), starts, [*starts[1:], len(both)], strict=True))
        )

    def _count_misses(
        self, layer: int, keys: np.ndarray, tenants: TokenTenants, misses: np.ndarray
    ) -> None:
        if tenants.single is not None and not self.can_miss[layer, tenants.single]:
            return
        missed = (keys >= len(self.slots_of_layer[layer])).sum(axis=1)
        misses += missed
        self.counts.misses += int(missed.sum())

    @abstractmethod
    def close(self) -> None:
        """Drop the weights."""


def _looked_up(table: np.ndarray, ids: np.ndarray, tenants: TokenTenants) -> np.ndarray:
    """table[tenant, expert] for each token's experts. ids: [T, K]."""
    return np.asarray(
        table[tenants.single][ids]
        if tenants.single is not None
        else table[tenants.ids[:, None], ids]
    )


def _mapped(refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
    """A copy's matrices as views of the store's files."""
    return {projection: as_tensor(ref.map()) for projection, ref in refs.items()}


def _key_tables(plan: Plan) -> tuple[list[list[int]], list[np.ndarray]]:
    """For each layer: the plan's copies in slot order, and keys int64 [tenants, experts]."""
    slots_of_layer: list[list[int]] = [[] for _ in range(plan.num_layers)]
    local = np.zeros(max(1, plan.num_slots), dtype=np.int64)
    for index, copy in enumerate(plan.copies):
        local[index] = len(slots_of_layer[copy.layer])
        slots_of_layer[copy.layer].append(index)
    tables = []
    for layer in range(plan.num_layers):
        serving = plan.serving[:, layer]
        own = len(slots_of_layer[layer]) + np.arange(serving.size).reshape(serving.shape)
        tables.append(np.where(serving == MISS, own, local[serving]).astype(np.int64))
    return slots_of_layer, tables


def _groups(sorted_keys: np.ndarray) -> list[tuple[int, int, int]]:
    """(key, start, stop) of each run of equal keys."""
    starts = [0, *(np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1).tolist()]
    stops = [*starts[1:], len(sorted_keys)]
    return [
        (key, a, b) for key, a, b in zip(sorted_keys[starts].tolist(), starts, stops, strict=True)
    ]


@dataclass(frozen=True)
class _Sorted:
    """Routing sorted by key and, in a key, by residual.

    order: int64 [T * K], where each row came from. groups: (key, start, stop). residuals: rows that
        have one.
    """

    order: np.ndarray
    groups: list[tuple[int, int, int]]
    residuals: list[RowResidual]


@dataclass(frozen=True)
class _Expert:
    """One copy, ready for products."""

    gate_up: Weight
    down: Weight


class LoopPool(ExpertPool):
    """One copy after another, each with its own (packed) matrices. Routing is read on the host: for
    a CPU."""

    def __init__(
        self,
        store: Store,
        dtype: torch.dtype,
        device: torch.device,
        spare_slots: int,
        product: Callable[[Tensor], Weight],
    ):
        kernels = native.load(dtype) if product is pack_native else None
        super().__init__(store, dtype, device, spare_slots, kernels)
        self._product = product
        self._contents = [[store.slot_content(i) for i in slots] for slots in self.slots_of_layer]
        self._resident = [
            [self._ready(_mapped(store.slot_refs(i))) for i in slots]
            for slots in self.slots_of_layer
        ]
        self._spare: OrderedDict[tuple[int, int], _Expert] = OrderedDict()
        self._native = self._whole_layer_kernels()

    def update(self, store: Store) -> None:
        made = _Plan(store, self.device, self._kernels)
        here = {
            content: expert
            for contents, experts in zip(self._contents, self._resident, strict=True)
            for content, expert in zip(contents, experts, strict=True)
        }
        contents = [[store.slot_content(i) for i in slots] for slots in made.slots_of_layer]
        resident = [
            [
                here.get(c) or self._ready(_mapped(store.slot_refs(i)))
                for i, c in zip(slots, row, strict=True)
            ]
            for slots, row in zip(made.slots_of_layer, contents, strict=True)
        ]
        self._spare.clear()  # its keys are those of the old plan
        self._take_plan(made)
        self._contents, self._resident = contents, resident
        self._native = self._whole_layer_kernels()

    def _whole_layer_kernels(self) -> native.Kernels | None:
        """Our own kernels, if they can read every copy and the two halves of gate_up begin at a
        block's edge."""
        if self.store.experts.intermediate_size % native.BLOCK:
            return None
        weights = [w for row in self._resident for e in row for w in (e.gate_up, e.down)]
        kernels = [w.kernels if isinstance(w, PackedWeight) else None for w in weights]
        return kernels[0] if kernels and all(k is not None for k in kernels) else None

    def _ready(self, copy: dict[str, Tensor]) -> _Expert:
        gate_up = torch.cat((copy["gate"], copy["up"])).to(self.device, self.dtype)
        return _Expert(
            self._product(gate_up), self._product(copy["down"].to(self.device, self.dtype))
        )

    def _expert(self, layer: int, key: int) -> _Expert:
        resident = self._resident[layer]
        if key < len(resident):
            return resident[key]
        found = self._spare.get((layer, key))
        if found is None:
            while len(self._spare) >= self.spare_slots:
                self._spare.popitem(last=False)
            found = self._spare[layer, key] = self._ready(self._missed(layer, key))
            self.counts.fetches += 1
            self.counts.fetched_bytes += self.copy_bytes
        else:
            self._spare.move_to_end((layer, key))
        return found

    def _feed_forward(
        self, expert: _Expert, x: Tensor, residuals: Sequence[RowResidual] = ()
    ) -> Tensor:
        """[rows, H] -> [rows, H]. residuals: in rows of x."""
        both = linear(x, expert.gate_up)
        gate, up = both.chunk(2, dim=-1)
        add_residuals(residuals, "gate", x, gate)
        add_residuals(residuals, "up", x, up)
        inner = self.activation(gate).mul_(up)
        out = linear(inner, expert.down)
        add_residuals(residuals, "down", inner, out)
        return out

    def _sorted(self, keys: np.ndarray, numbers: np.ndarray | None) -> _Sorted:
        """keys, numbers: int64 [T, K]."""
        flat = keys.reshape(-1)
        if numbers is None:
            order = np.argsort(flat, kind="stable")
            return _Sorted(order, _groups(flat[order]), [])
        both = flat * (len(self.residuals.items) + 1) + numbers.reshape(-1)
        order = np.argsort(both, kind="stable")
        return _Sorted(
            order,
            _groups(flat[order]),
            self._row_residuals(numbers.reshape(-1)[order], both[order]),
        )

    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        tenants: TokenTenants,
        misses: np.ndarray,
    ) -> Tensor:
        ids = expert_ids.cpu().numpy()
        keys = _looked_up(self.keys[layer], ids, tenants)
        self._count_misses(layer, keys, tenants, misses)
        found = self._sorted(keys, self._numbers(layer, ids, tenants))
        if self._native is not None:
            whole = self._forward_native(layer, x, found, weights)
            if whole is not None:
                return whole
        if len(x) == 1:
            out: Tensor | None = None
            for row, (key, start, stop) in sorted(
                zip(found.order.tolist(), found.groups, strict=True)
            ):
                part = self._feed_forward(
                    self._expert(layer, key), x, residuals_within(found.residuals, start, stop)
                )
                part.mul_(float(weights[0, row]))
                out = part if out is None else out.add_(part)
            assert out is not None
            return out
        by_key = x.index_select(0, torch.from_numpy(found.order // self.top_k).to(self.device))
        parts = [
            self._feed_forward(
                self._expert(layer, key),
                by_key[start:stop],
                residuals_within(found.residuals, start, stop),
            )
            for key, start, stop in found.groups
        ]
        inverse = np.empty_like(found.order)
        inverse[found.order] = np.arange(len(found.order))
        by_token = torch.cat(parts).index_select(0, torch.from_numpy(inverse).to(self.device))
        return by_token.view(len(x), self.top_k, -1).mul_(weights[..., None].to(x.dtype)).sum(dim=1)

    def _forward_native(
        self, layer: int, x: Tensor, rows: _Sorted, weights: Tensor
    ) -> Tensor | None:
        """All experts of the layer in one call of our own kernels; None if there are too many rows
        or misses for it."""
        assert self._native is not None
        groups = rows.groups
        num_missing = sum(key >= len(self._resident[layer]) for key, _, _ in groups)
        if (
            num_missing > self.spare_slots
            or max(stop - start for _, start, stop in groups) > self._native.max_rows
        ):
            return None
        # Held here until the call returns, so that a fetch cannot push out what an earlier one
        # brought.
        experts = [self._expert(layer, key) for key, _, _ in groups]
        gate_up = [p for p in (_place(e.gate_up) for e in experts) if p is not None]
        down = [p for p in (_place(e.down) for e in experts) if p is not None]
        if len(gate_up) + len(down) < 2 * len(experts):
            return None
        places = np.empty_like(rows.order)
        places[rows.order] = np.arange(len(rows.order))
        residuals = [
            (r.start, r.stop, r.residual.native)
            for r in rows.residuals
            if r.residual.native is not None
        ]
        assert len(residuals) == len(rows.residuals)
        return native.experts(
            self._native,
            x,
            gate_up,
            down,
            self.store.experts.intermediate_size,
            np.array([start for _, start, _ in groups] + [len(rows.order)], dtype=np.int64),
            rows.order // self.top_k,
            places,
            weights,
            self.store.experts.activation,
            residuals,
        )

    @property
    def device_bytes(self) -> int:
        return (self.plan.num_slots + len(self._spare)) * self.copy_bytes

    @property
    def spare_filled(self) -> int:
        return len(self._spare)

    def close(self) -> None:
        self._resident.clear()
        self._spare.clear()
        self._missing.clear()
        self.residuals.close()


def _place(weight: Weight) -> native.Place | None:
    return weight.place if isinstance(weight, PackedWeight) else None


def find_grouped_mm() -> Callable[..., Tensor] | None:
    """`torch.nn.functional.grouped_mm`, public since torch 2.10, or its private forerunner."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_mm_fits(
    hidden_size: int, intermediate_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the grouped product takes these shapes: strides in multiples of 16 bytes, on CUDA
    bfloat16 alone."""
    step = 16 // dtype.itemsize
    aligned = hidden_size % step == 0 and intermediate_size % step == 0
    return (
        find_grouped_mm() is not None
        and aligned
        and (device.type != "cuda" or dtype == torch.bfloat16)
    )


class GroupedPool(ExpertPool):
    """All copies of a layer in one tensor a projection, one grouped product over all tokens.
    Routing stays on the device.

    gate_up: [S, 2I, H]; down: [S, H, I] a layer. Spare slots: the same, one tensor for all layers.

    A miss that is expected (see `expect`) is brought by a thread of its own: reading an expert from
    its file into pinned memory takes the host longer than a layer takes the device.
    """

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, spare_slots: int):
        super().__init__(store, dtype, device, spare_slots)
        self._gate_up: list[Tensor] = []
        self._down: list[Tensor] = []
        for slots in self.slots_of_layer:
            gate_up, down = self._empty(len(slots))
            for slot, index in enumerate(slots):
                _fill(gate_up[slot], down[slot], _mapped(store.slot_refs(index)))
            self._gate_up.append(gate_up)
            self._down.append(down)
        self._contents = [[store.slot_content(i) for i in slots] for slots in self.slots_of_layer]
        self._spare: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._spare_gate_up, self._spare_down = self._empty(0)
        self._staging: _Staging | None = None
        self._passes = 0
        self._used_in = [0] * spare_slots
        self._coming: dict[int, Future[torch.cuda.Event | None]] = {}
        self._carrier: ThreadPoolExecutor | None = None
        self._carrier_staging: _Staging | None = None
        self._make_tables()
        grouped_mm = find_grouped_mm()
        assert grouped_mm is not None
        self._grouped_mm = grouped_mm

    def _empty(self, slots: int) -> tuple[Tensor, Tensor]:
        """Places for so many copies."""
        hidden, inter = self.store.experts.hidden_size, self.store.experts.intermediate_size
        return (
            torch.empty(slots, 2 * inter, hidden, dtype=self.dtype, device=self.device),
            torch.empty(slots, hidden, inter, dtype=self.dtype, device=self.device),
        )

    def _make_tables(self) -> None:
        """The plan's tables on the device, and spare slots if it can miss."""
        device = self.device
        self._tables = [torch.from_numpy(k).to(device) for k in self.keys]
        self._residual_numbers = [torch.from_numpy(n).to(device) for n in self.residuals.numbers]
        self._slot_numbers = [torch.arange(len(s), device=device) for s in self.slots_of_layer]
        self._uses = np.zeros(
            (len(self.plan.tenants), self.plan.num_layers, self.plan.num_experts), dtype=np.int64
        )
        if self.can_miss.any() and not len(self._spare_gate_up):
            self._spare_gate_up, self._spare_down = self._empty(self.spare_slots)
            if device.type == "cuda":
                self._staging = _Staging(self.store.experts.copy_elements, self.dtype, device)

    def update(self, store: Store) -> None:
        made = _Plan(store, self.device, self._kernels)
        contents = [[store.slot_content(i) for i in slots] for slots in made.slots_of_layer]
        # All that is new is mapped before anything is overwritten: a missing file is found here.
        mapped = {
            (layer, slot): _mapped(store.slot_refs(index))
            for layer, slots in enumerate(made.slots_of_layer)
            for slot, index in enumerate(slots)
            if contents[layer][slot] not in self._contents[layer]
        }
        for layer, row in enumerate(contents):
            old = {content: slot for slot, content in enumerate(self._contents[layer])}
            if row == self._contents[layer]:
                continue
            if len(row) == len(old) and all(old.get(c, slot) == slot for slot, c in enumerate(row)):
                gate_up, down = (
                    self._gate_up[layer],
                    self._down[layer],
                )  # what stays has its place already
            else:
                gate_up, down = self._empty(len(row))
            for slot, content in enumerate(row):
                if content not in old:
                    _fill(gate_up[slot], down[slot], mapped[layer, slot])
                elif gate_up is not self._gate_up[layer]:
                    gate_up[slot].copy_(self._gate_up[layer][old[content]])
                    down[slot].copy_(self._down[layer][old[content]])
            self._gate_up[layer], self._down[layer] = gate_up, down
        self._forget_spare()  # its keys are those of the old plan
        self._contents = contents
        self._take_plan(made)
        self._make_tables()

    def _products(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ends: Tensor,
        residuals: Sequence[RowResidual] = (),
    ) -> Tensor:
        """x: [rows, H] sorted by slot; ends: int32 [slots], where each slot's rows end; ends[-1] is
        rows."""
        gate, up = self._grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        add_residuals(residuals, "gate", x, gate)
        add_residuals(residuals, "up", x, up)
        inner = self.activation(gate) * up
        out = self._grouped_mm(inner, down.transpose(1, 2), offs=ends)
        add_residuals(residuals, "down", inner, out)
        return out

    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        tenants: TokenTenants,
        misses: np.ndarray,
    ) -> Tensor:
        self._passes += layer == 0
        can_miss = self.can_miss[layer, np.unique(tenants.ids)].any()
        has_residuals = self.residuals.among(layer, tenants.ids, tenants.single)
        keys = self._looked_up(self._tables[layer], expert_ids, tenants)
        residuals: list[RowResidual] = []
        if has_residuals:
            # One sort by slot and residual; the host must know which residuals to add, so it waits
            # for the routing.
            count = len(self.residuals.items) + 1
            numbers = self._looked_up(self._residual_numbers[layer], expert_ids, tenants)
            both, order = (keys * count + numbers).reshape(-1).sort(stable=True)
            sorted_keys = both // count
            on_host = both.cpu().numpy()
            residuals = self._row_residuals(on_host % count, on_host)
        else:
            sorted_keys, order = keys.reshape(-1).sort(stable=True)
        by_key = x.index_select(0, order // self.top_k)
        ends = torch.searchsorted(sorted_keys, self._slot_numbers[layer], right=True).to(
            torch.int32
        )
        if can_miss:
            # The host must know what to fetch, so it waits for the routing of this layer.
            on_host = keys.cpu().numpy()
            self._count_misses(layer, on_host, tenants, misses)
            missed = on_host[on_host >= len(self.slots_of_layer[layer])] - len(
                self.slots_of_layer[layer]
            )
            np.add.at(self._uses[:, layer], np.divmod(missed, self.plan.num_experts), 1)
            out = self._with_misses(layer, by_key, sorted_keys.cpu().numpy(), ends, residuals)
        else:
            out = self._products(by_key, self._gate_up[layer], self._down[layer], ends, residuals)
        by_token = torch.empty_like(out)
        by_token[order] = out
        return by_token.view(len(x), self.top_k, -1).mul_(weights[..., None].to(x.dtype)).sum(dim=1)

    def _looked_up(self, table: Tensor, expert_ids: Tensor, tenants: TokenTenants) -> Tensor:
        """table[tenant, expert] for each token's experts, on the device."""
        if tenants.single is not None:
            return table[tenants.single][expert_ids]
        return table[torch.from_numpy(tenants.ids).to(self.device)[:, None], expert_ids]

    def _with_misses(
        self,
        layer: int,
        by_key: Tensor,
        sorted_keys: np.ndarray,
        ends: Tensor,
        residuals: Sequence[RowResidual],
    ) -> Tensor:
        """Resident rows first, then the missing ones in rounds of as many experts as there are
        spare slots."""
        num_slots = len(self.slots_of_layer[layer])
        num_resident = int((sorted_keys < num_slots).sum())
        parts = []
        if num_resident:
            resident = by_key[:num_resident]
            parts.append(
                self._products(resident, self._gate_up[layer], self._down[layer], ends, residuals)
            )
        missing = [g for g in _groups(sorted_keys) if g[0] >= num_slots]
        for first in range(0, len(missing), self.spare_slots):
            rows = missing[first : first + self.spare_slots]
            slots = [self._spare_slot(layer, key, {k for k, _, _ in rows}) for key, _, _ in rows]
            # A grouped product takes slots in order: the rows of this round are put into that
            # order, and back.
            by_slot = sorted(range(len(rows)), key=lambda i: slots[i])
            order = torch.cat([torch.arange(rows[i][1], rows[i][2]) for i in by_slot]).to(
                self.device
            )
            counts = np.zeros(self.spare_slots, dtype=np.int32)
            for i, (_, start, stop) in enumerate(rows):
                counts[slots[i]] = stop - start
            spare_ends = torch.from_numpy(np.cumsum(counts, dtype=np.int32)).to(self.device)
            found = self._products(
                by_key.index_select(0, order), self._spare_gate_up, self._spare_down, spare_ends
            )
            back = torch.empty_like(found)
            back[order - rows[0][1]] = found
            parts.append(back)
        return torch.cat(parts)

    def _spare_slot(self, layer: int, key: int, needed: set[int]) -> int:
        """The spare slot that holds a missing expert, fetching it if need be; those `needed` in
        this round stay."""
        if (layer, key) in self._spare:
            self._spare.move_to_end((layer, key))
            slot = self._spare[layer, key]
            if slot in self._coming:
                arrived = self._coming[slot].result()
                del self._coming[slot]
                if arrived is not None:
                    torch.cuda.current_stream(self.device).wait_event(arrived)
        else:
            slot = len(self._spare)
            if slot == self.spare_slots:
                slot = self._emptied(
                    next(k for k in self._spare if k[0] != layer or k[1] not in needed)
                )
            arrived = self._bring(slot, layer, key, self._staging, self._now())
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)
            self._spare[layer, key] = slot
            self.counts.fetches += 1
            self.counts.fetched_bytes += self.copy_bytes
        self._used_in[slot] = self._passes
        return slot

    def _emptied(self, key: tuple[int, int]) -> int:
        """The slot of a spare expert, which is forgotten."""
        slot = self._spare.pop(key)
        coming = self._coming.pop(slot, None)
        if coming is not None:
            coming.exception()  # waits; whether it came no longer matters
        return slot

    def _now(self) -> torch.cuda.Event | None:
        """After all that was issued so far: kernels that still read a slot's last content."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @torch.inference_mode()
    def _bring(
        self,
        slot: int,
        layer: int,
        key: int,
        staging: _Staging | None,
        after: torch.cuda.Event | None,
    ) -> torch.cuda.Event | None:
        """Copy a missing expert into a spare slot, on the device after `after`. When it has
        arrived; None: it has."""
        gate_up, down = self._spare_gate_up[slot], self._spare_down[slot]
        if staging is None or after is None:
            _fill(gate_up, down, self._missed(layer, key))
            return None
        host_gate_up, host_down = staging.views(gate_up.shape, down.shape)
        _fill(host_gate_up, host_down, self._missed(layer, key))
        return staging.send(((host_gate_up, gate_up), (host_down, down)), after)

    def expect(self, tenant: int) -> None:
        """The experts that it missed most often so far come into spare slots that the last pass did
        not use."""
        uses = self._uses[tenant]
        if not uses.any():
            return
        num_experts = self.plan.num_experts
        own = range(tenant * num_experts, (tenant + 1) * num_experts)
        idle = [
            (layer, key)
            for (layer, key), slot in self._spare.items()
            if self._used_in[slot] < self._passes
            and key - len(self.slots_of_layer[layer]) not in own
        ]
        room = self.spare_slots - len(self._spare) + len(idle)
        for flat in np.argsort(-uses, axis=None, kind="stable")[: np.count_nonzero(uses)].tolist():
            if not room:
                return
            layer, expert = divmod(flat, num_experts)
            key = len(self.slots_of_layer[layer]) + own[expert]
            if (layer, key) in self._spare:
                continue
            slot = (
                len(self._spare)
                if len(self._spare) < self.spare_slots
                else self._emptied(idle.pop(0))
            )
            room -= 1
            if self._carrier is None:
                self._carrier = ThreadPoolExecutor(1, thread_name_prefix="moetel-expected-misses")
                if self._staging is not None:
                    self._carrier_staging = _Staging(
                        self.store.experts.copy_elements, self.dtype, self.device
                    )
            self._coming[slot] = self._carrier.submit(
                self._bring, slot, layer, key, self._carrier_staging, self._now()
            )
            self._spare[layer, key] = slot
            self._used_in[slot] = self._passes
            self.counts.prefetches += 1
            self.counts.fetched_bytes += self.copy_bytes

    def _forget_spare(self) -> None:
        for key in list(self._spare):
            self._emptied(key)

    @property
    def device_bytes(self) -> int:
        tensors = [*self._gate_up, *self._down, self._spare_gate_up, self._spare_down]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def spare_filled(self) -> int:
        return len(self._spare)

    def close(self) -> None:
        self._forget_spare()
        if self._carrier is not None:
            self._carrier.shutdown()
        self._gate_up.clear()
        self._down.clear()
        self._missing.clear()
        self.residuals.close()
        self._spare_gate_up = self._spare_down = torch.empty(0)


def _fill(gate_up: Tensor, down: Tensor, copy: dict[str, Tensor]) -> None:
    """Put a copy's matrices into its place in a pool: [2I, H] and [H, I]."""
    inter = len(gate_up) // 2
    gate_up[:inter].copy_(copy["gate"])
    gate_up[inter:].copy_(copy["up"])
    down.copy_(copy["down"])


class _Staging:
    """Two pinned host buffers of one copy each, one filled while the other is sent, and a stream
    for their copies."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device):
        self._device = device
        self._buffers = [torch.empty(elements, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._stream = torch.cuda.Stream(device)
        self._turn = 0

    def views(self, gate_up: torch.Size, down: torch.Size) -> tuple[Tensor, Tensor]:
        """Places to fill, free again once their last copy has left."""
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        buffer = self._buffers[self._turn]
        return buffer[: gate_up.numel()].view(gate_up), buffer[gate_up.numel() :].view(down)

    def send(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event
    ) -> torch.cuda.Event:
        """Copy host to device on the own stream, once `after` has come. When they have arrived."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for host, device in pairs:
                device.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent[self._turn] = event
        return event
