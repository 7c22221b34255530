"""The pool of a device with a grouped product: all copies of a layer in one tensor a projection.

Legend: tokens T, top_k K, slots S of one layer, hidden H, intermediate I.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from common.store import Store
from torch_engine.experts.grouped_product import find_grouped_mm
from torch_engine.experts.pool import ExpertPool, PoolPlan, mapped
from torch_engine.experts.residuals import ResidentResiduals, RowResidual, add_residuals
from torch_engine.experts.staging import Staging, fill
from torch_engine.experts.token_tenants import TokenTenants, groups_of

LOG = logging.getLogger(__name__)


class GroupedPool(ExpertPool):
    """All copies of a layer in one tensor a projection, one grouped product over all tokens.
    Routing stays on the device.

    gate_up: [S, 2I, H]; down: [S, H, I] a layer. Spare slots: the same, one tensor for all layers.

    A miss that is expected (see `expect`) is brought by a thread of its own: reading an expert from
    its file into pinned memory takes the host longer than a layer takes the device.
    """

    residuals: ResidentResiduals

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, spare_slots: int):
        super().__init__(store, dtype, device, spare_slots)
        self._gate_up: list[Tensor] = []
        self._down: list[Tensor] = []
        for slots in self.slots_of_layer:
            gate_up, down = self._empty(len(slots))
            for slot, index in enumerate(slots):
                fill(gate_up[slot], down[slot], mapped(store.slot_refs(index)))
            self._gate_up.append(gate_up)
            self._down.append(down)
        self._contents = [[store.slot_content(i) for i in slots] for slots in self.slots_of_layer]
        self._spare: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._spare_gate_up, self._spare_down = self._empty(0)
        self._staging: Staging | None = None
        self._passes = 0
        self._used_in = [0] * spare_slots
        self._coming: dict[int, Future[torch.cuda.Event | None]] = {}
        self._carrier: ThreadPoolExecutor | None = None
        self._carrier_staging: Staging | None = None
        self._make_tables()
        grouped_mm = find_grouped_mm()
        assert grouped_mm is not None
        self._grouped_mm = grouped_mm

    def make_residuals(self, plan: PoolPlan) -> ResidentResiduals:
        return ResidentResiduals(plan.store, self.device)

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
            self._make_spare()

    def _make_spare(self) -> None:
        self._spare_gate_up, self._spare_down = self._empty(self.spare_slots)
        if self.device.type == "cuda":
            self._staging = Staging(self.store.experts.copy_elements, self.dtype, self.device)

    def update(self, store: Store) -> None:
        made = PoolPlan(store)
        residuals = self.make_residuals(made)
        contents = [[store.slot_content(i) for i in slots] for slots in made.slots_of_layer]
        # All that is new is mapped before anything is overwritten: a missing file is found here.
        new = {
            (layer, slot): mapped(store.slot_refs(index))
            for layer, slots in enumerate(made.slots_of_layer)
            for slot, index in enumerate(slots)
            if contents[layer][slot] not in self._contents[layer]
        }
        # So is all room taken first: what fails there has changed nothing.
        old_slots = [{c: slot for slot, c in enumerate(row)} for row in self._contents]
        room: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, row in enumerate(contents):
            old = old_slots[layer]
            if len(row) != len(old) or any(old.get(c, s) != s for s, c in enumerate(row)):
                room[layer] = self._empty(len(row))
        if made.can_miss.any() and not len(self._spare_gate_up):
            self._make_spare()
        for layer, row in enumerate(contents):
            old = old_slots[layer]
            if row == self._contents[layer]:
                continue
            # Without room of its own, what stays has its place already.
            gate_up, down = room.get(layer, (self._gate_up[layer], self._down[layer]))
            for slot, content in enumerate(row):
                if content not in old:
                    fill(gate_up[slot], down[slot], new[layer, slot])
                elif gate_up is not self._gate_up[layer]:
                    gate_up[slot].copy_(self._gate_up[layer][old[content]])
                    down[slot].copy_(self._down[layer][old[content]])
            self._gate_up[layer], self._down[layer] = gate_up, down
        self._forget_spare()  # its keys are those of the old plan
        self._contents = contents
        self._take_plan(made, residuals)
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
            residuals = self.residuals.rows(on_host % count, on_host)
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
        missing = [g for g in groups_of(sorted_keys) if g[0] >= num_slots]
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
                try:
                    self._wait(self._coming.pop(slot).result())
                except Exception:
                    # What was expected did not come: it is fetched now, or the request is told why.
                    LOG.warning("an expected expert did not arrive", exc_info=True)
                    self._wait(self._bring(slot, layer, key, self._staging, self._now()))
        else:
            slot = len(self._spare)
            if slot == self.spare_slots:
                slot = self._emptied(
                    next(k for k in self._spare if k[0] != layer or k[1] not in needed)
                )
            self._wait(self._bring(slot, layer, key, self._staging, self._now()))
            self._spare[layer, key] = slot
            self.counts.fetches += 1
            self.counts.fetched_bytes += self.copy_bytes
        self._used_in[slot] = self._passes
        return slot

    def _emptied(self, key: tuple[int, int]) -> int:
        """The slot of a spare expert, which is forgotten."""
        slot = self._spare.pop(key)
        coming = self._coming.pop(slot, None)
        if coming is not None and coming.exception() is None:
            # What comes into the slot next must come after it.
            self._wait(coming.result())
        return slot

    def _wait(self, arrived: torch.cuda.Event | None) -> None:
        """Have the device compute what follows after a copy has arrived."""
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

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
        staging: Staging | None,
        after: torch.cuda.Event | None,
    ) -> torch.cuda.Event | None:
        """Copy a missing expert into a spare slot, on the device after `after`. When it has
        arrived; None: it has."""
        gate_up, down = self._spare_gate_up[slot], self._spare_down[slot]
        if staging is None or after is None:
            fill(gate_up, down, self._missed(layer, key))
            return None
        host_gate_up, host_down = staging.views(gate_up.shape, down.shape)
        fill(host_gate_up, host_down, self._missed(layer, key))
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
                    self._carrier_staging = Staging(
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
