"""The pool of a device with a grouped product: all copies of a layer in one tensor a projection.

Legend: tokens T, top_k K, slots S of one layer, hidden H, intermediate I.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.store import Store
from torch_engine.device import why_no_triton
from torch_engine.experts.grouped_product import find_grouped_mm
from torch_engine.experts.grouped_residuals import ResidualTable, RowTiles
from torch_engine.experts.missing_experts import Missing, SpareSlots
from torch_engine.experts.pool import ExpertPool, PoolPlan, mapped
from torch_engine.experts.residuals import AddedResiduals, ResidentResiduals, ResidualRuns
from torch_engine.experts.staging import fill
from torch_engine.experts.token_tenants import TokenTenants, groups_of


class GroupedPool(ExpertPool):
    """All copies of a layer in one tensor a projection, one grouped product over all tokens.
    Routing stays on the device.

    gate_up: [S, 2I, H]; down: [S, H, I] a layer. Spare slots: the same, one tensor for all layers.
    residual_table: what kernels add; None: there are no residuals, or plain operations add them.
    """

    residuals: ResidentResiduals

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, spare_slots: int):
        super().__init__(store, dtype, device, spare_slots)
        self._gate_up: list[Tensor] = []
        self._down: list[Tensor] = []
        for slots in self.slots_of_layer:
            gate_up, down = self._empty(len(slots))
            for slot, index in enumerate(slots):
                fill(gate_up[slot], down[slot], mapped(store, store.slot_refs(index)))
            self._gate_up.append(gate_up)
            self._down.append(down)
        self._contents = [[store.slot_content(i) for i in slots] for slots in self.slots_of_layer]
        self._spare: SpareSlots | None = None
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
        self.residual_table: ResidualTable | None = None
        if self.residuals.items and why_no_triton(device) is None:
            self.residual_table = ResidualTable(self.residuals, device)
        if self.can_miss.any():
            self._make_spare()

    def _make_spare(self) -> None:
        if self._spare is None:
            places = self._empty(self.spare_slots)
            self._spare = SpareSlots(*places, self._read_missing, self.counts)

    def _read_missing(self, missing: Missing) -> dict[str, Tensor]:
        layer, number = missing
        return self._missed(layer, len(self.slots_of_layer[layer]) + number)

    def update(self, store: Store) -> None:
        made = PoolPlan(store)
        residuals = self.make_residuals(made)
        contents = [[store.slot_content(i) for i in slots] for slots in made.slots_of_layer]
        # All that is new is mapped before anything is overwritten: a missing file is found here.
        new = {
            (layer, slot): mapped(store, store.slot_refs(index))
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
        if made.can_miss.any():
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
        if self._spare is not None:
            self._spare.forget()
        self._contents = contents
        self._take_plan(made, residuals)
        self._make_tables()

    def _products(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ends: Tensor,
        residuals: AddedResiduals | None = None,
    ) -> Tensor:
        """x: [rows, H] sorted by slot; ends: int32 [slots], where each slot's rows end; ends[-1] is
        rows."""
        both = self._grouped_mm(x, gate_up.transpose(1, 2), offs=ends)
        if residuals is not None:
            residuals.add(("gate", "up"), x, both)
        gate, up = both.chunk(2, dim=-1)
        inner = self.activation(gate) * up
        out = self._grouped_mm(inner, down.transpose(1, 2), offs=ends)
        if residuals is not None:
            residuals.add(("down",), inner, out)
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
        if layer == 0 and self._spare is not None:
            self._spare.begin_pass()
        can_miss = self.can_miss[layer, np.unique(tenants.ids)].any()
        has_residuals = self.residuals.among(layer, tenants.ids, tenants.single)
        keys = self._looked_up(self._tables[layer], expert_ids, tenants)
        if has_residuals:  # one sort by slot and residual
            count = len(self.residuals.items) + 1
            numbers = self._looked_up(self._residual_numbers[layer], expert_ids, tenants)
            both, order = (keys * count + numbers).reshape(-1).sort(stable=True)
            sorted_keys, sorted_numbers = both // count, both % count
        else:
            sorted_keys, order = keys.reshape(-1).sort(stable=True)
        by_key = x.index_select(0, order // self.top_k)
        ends = torch.searchsorted(sorted_keys, self._slot_numbers[layer], right=True).to(
            torch.int32
        )
        residuals = None
        if has_residuals:
            residuals = self._added(layer, sorted_numbers, ends, tenants)
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

    def _added(
        self, layer: int, numbers: Tensor, ends: Tensor, tenants: TokenTenants
    ) -> AddedResiduals:
        """What rows add. numbers: int64 [rows], sorted by slot: 1 + a residual, which has one slot,
        or 0."""
        table = self.residual_table
        if table is None:
            # Plain operations need to be told which residuals to add, so the host waits.
            on_host = numbers.cpu().numpy()
            return ResidualRuns(self.residuals.rows(on_host, on_host))
        groups = int(table.counts[layer, np.unique(tenants.ids)].sum())
        tiles = RowTiles(table, len(numbers), len(tenants.ids), groups)
        tiles.cut(numbers, None, ends[-1:])
        return tiles

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
        residuals: AddedResiduals | None,
    ) -> Tensor:
        """Resident rows first, then the missing ones in rounds of as many experts as there are
        spare slots."""
        spare = self._spare
        assert spare is not None
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
            needed = [(layer, key - num_slots) for key, _, _ in rows]
            slots = [spare.hold(missing, set(needed)) for missing in needed]
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
                by_key.index_select(0, order), spare.gate_up, spare.down, spare_ends
            )
            back = torch.empty_like(found)
            back[order - rows[0][1]] = found
            parts.append(back)
        return torch.cat(parts)

    def expect(self, tenant: int) -> None:
        """The experts that it missed most often so far come into spare slots that the last pass did
        not use."""
        uses = self._uses[tenant]
        if self._spare is None or not uses.any():
            return
        count = self.plan.num_experts
        most = np.argsort(-uses, axis=None, kind="stable")[: np.count_nonzero(uses)].tolist()
        wanted = [(flat // count, tenant * count + flat % count) for flat in most]
        self._spare.expect(wanted, but=lambda held: held[1] // count == tenant)

    @property
    def device_bytes(self) -> int:
        spare = self._spare.nbytes if self._spare is not None else 0
        return spare + sum(t.nbytes for t in [*self._gate_up, *self._down])

    @property
    def spare_filled(self) -> int:
        return len(self._spare.filled) if self._spare is not None else 0

    def close(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        self._gate_up.clear()
        self._down.clear()
        self.residuals.close()
