"""Places on a device for tenants' own experts that the pool lacks, and how those get there.

An expert that a step turns out to need is fetched while the step waits. One that a tenant who is
about to enter missed before is brought ahead, by a thread: reading an expert from its file into
pinned memory takes the host longer than a layer takes the device.

Legend: hidden H, intermediate I.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from torch_engine.experts.pool import PoolCounts
from torch_engine.experts.staging import Staging, fill

LOG = logging.getLogger(__name__)

# A layer, and one of its missing experts: tenant * experts + expert.
Missing = tuple[int, int]


class SpareSlots:
    """The least recently used expert gives up its slot.

    gate_up: [slots, 2I, H]; down: [slots, H, I]. filled: slots by what they hold, in order of use.

    Args:
        read: a missing expert's matrices, as views of the store's files.
        counts: of the pool; fetches and prefetches are added to.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        read: Callable[[Missing], dict[str, Tensor]],
        counts: PoolCounts,
    ):
        self.gate_up, self.down, self._counts = gate_up, down, counts
        self._device = gate_up.device
        self._copy_elements = gate_up[0].numel() + down[0].numel()
        self._copy_bytes = self._copy_elements * gate_up.element_size()
        self._read = read
        self.filled: OrderedDict[Missing, int] = OrderedDict()
        self._free = list(range(len(gate_up)))
        self._passes = 0
        self._used_in = [0] * len(gate_up)
        self._staging = self._make_staging()
        self._coming: dict[int, Future[torch.cuda.Event | None]] = {}
        self._carrier: ThreadPoolExecutor | None = None
        self._carrier_staging: Staging | None = None

    def __len__(self) -> int:
        return len(self.gate_up)

    @property
    def nbytes(self) -> int:
        return len(self) * self._copy_bytes

    def begin_pass(self) -> None:
        """The layers are computed from the first one on: what the last pass used may go."""
        self._passes += 1

    def hold(self, wanted: Missing, needed: set[Missing]) -> int:
        """The slot that holds a missing expert, fetched if need be. Those `needed` stay."""
        slot = self.filled.get(wanted)
        if slot is not None and self._arrived(slot):
            self.filled.move_to_end(wanted)
        else:
            if slot is not None:
                self._empty(wanted)
            slot = self._take(next((m for m in self.filled if m not in needed), None))
            try:
                self._wait(self._bring(slot, wanted, self._staging, self._now()))
            except Exception:
                self._free.append(slot)
                raise
            self.filled[wanted] = slot
            self._counts.fetches += 1
            self._counts.fetched_bytes += self._copy_bytes
        self._used_in[slot] = self._passes
        return slot

    def expect(self, wanted: Iterable[Missing], but: Callable[[Missing], bool]) -> None:
        """Bring experts into slots that the last pass did not use, those `but` names left alone."""
        idle = [
            held
            for held, slot in self.filled.items()
            if self._used_in[slot] < self._passes and not but(held)
        ]
        room = len(self._free) + len(idle)
        for missing in wanted:
            if not room:
                return
            if missing in self.filled:
                continue
            room -= 1
            slot = self._take(None if self._free else idle.pop(0))
            if self._carrier is None:
                self._carrier = ThreadPoolExecutor(1, thread_name_prefix="moetel-expected-misses")
                self._carrier_staging = self._make_staging()
            self._coming[slot] = self._carrier.submit(
                self._bring, slot, missing, self._carrier_staging, self._now()
            )
            self.filled[missing] = slot
            self._used_in[slot] = self._passes
            self._counts.prefetches += 1
            self._counts.fetched_bytes += self._copy_bytes

    def forget(self) -> None:
        """Hold nothing: another plan numbers tenants otherwise."""
        for missing in list(self.filled):
            self._empty(missing)

    def close(self) -> None:
        self.forget()
        if self._carrier is not None:
            self._carrier.shutdown()

    def _make_staging(self) -> Staging | None:
        if self._device.type != "cuda":
            return None
        return Staging(self._copy_elements, self.gate_up.dtype, self._device)

    def _take(self, victim: Missing | None) -> int:
        """An empty slot, where there is none that of `victim`."""
        if not self._free:
            assert victim is not None
            self._empty(victim)
        return self._free.pop(0)

    def _empty(self, missing: Missing) -> None:
        slot = self.filled.pop(missing)
        coming = self._coming.pop(slot, None)
        if coming is not None and coming.exception() is None:
            # What comes into the slot next must come after it.
            self._wait(coming.result())
        self._free.append(slot)

    def _arrived(self, slot: int) -> bool:
        """Whether a slot has what was expected, for which the device waits."""
        coming = self._coming.pop(slot, None)
        try:
            if coming is not None:
                self._wait(coming.result())
        except Exception:
            # It is fetched now, or the request is told why that cannot be.
            LOG.warning("an expected expert did not arrive", exc_info=True)
            return False
        return True

    def _wait(self, arrived: torch.cuda.Event | None) -> None:
        """Have the device compute what follows after a copy has arrived."""
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def _now(self) -> torch.cuda.Event | None:
        """After all that was issued so far: kernels that still read a slot's last content."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    @torch.inference_mode()
    def _bring(
        self, slot: int, missing: Missing, staging: Staging | None, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copy an expert into a slot, on the device after `after`. When it has arrived; None: it
        has."""
        gate_up, down = self.gate_up[slot], self.down[slot]
        if staging is None or after is None:
            fill(gate_up, down, self._read(missing))
            return None
        host_gate_up, host_down = staging.views(gate_up.shape, down.shape)
        fill(host_gate_up, host_down, self._read(missing))
        return staging.send(((host_gate_up, gate_up), (host_down, down)), after)
