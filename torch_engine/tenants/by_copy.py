"""Ready tenants on CUDA: each is one flat pinned host buffer. A switch is a few large copies on a
stream of their own, layer by layer, and nothing is copied back: weights never change."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from common.families import Decoder
from common.store import Store
from torch_engine.layers.rotary import RotaryTable
from torch_engine.products import PlainWeight
from torch_engine.tenants.ready import unchanged
from torch_engine.tenants.tenant_buffer import FlatLayout
from torch_engine.tenants.weights import (
    Content,
    Entry,
    TenantWeights,
    arrange,
    content_of,
    entries,
    mapped_entry,
    shape_of,
)


@dataclass
class _DeviceBuffer:
    """One tenant-sized place on the device."""

    data: Tensor
    tenant: str | None = None
    weights: TenantWeights | None = None


@dataclass(frozen=True)
class _HostTenant:
    """One tenant's weights on the host; host: [layout.elements]. common: entries that other tenants
    have too, on the device."""

    shape: Decoder
    layout: FlatLayout
    host: Tensor
    rotary: RotaryTable
    common: dict[str, PlainWeight]


class TenantsByCopy:
    """Tenants in flat host buffers, of which `capacity` are copied to device buffers, least
    recently used first out. What several tenants have equal stays on the device beside them, unless
    that took more memory. It is looked for among tenants that are loaded together, and those that
    come later may use it.

    Works on any device, for tests; on CUDA host buffers are pinned, copies run on their own stream
    with an event a stage, and the computation waits for a stage only when it gets there.
    """

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, capacity: int):
        self._dtype, self._device = dtype, device
        self.capacity = capacity
        self.switches = 0
        self.copied_bytes = 0
        self._store = store
        self._common: WeakValueDictionary[Content, PlainWeight] = WeakValueDictionary()
        self._tenants = self._on_hosts(store, store.tenants, capacity)
        largest = max(t.layout.elements for t in self._tenants.values())
        self._buffers = [
            _DeviceBuffer(torch.empty(largest, dtype=dtype, device=device)) for _ in range(capacity)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._order: OrderedDict[str, _DeviceBuffer] = OrderedDict()
        self._timers: dict[str, tuple[torch.cuda.Event, torch.cuda.Event] | float] = {}
        self._untold: set[str] = set()
        self._last: frozenset[str] = frozenset()

    def _on_hosts(
        self,
        store: Store,
        names: Collection[str],
        capacity: int,
        kept: Collection[_HostTenant] = (),
    ) -> dict[str, _HostTenant]:
        """Tenants that are loaded together, beside those that were there before.

        A place on the device is as large as the largest tenant needs. One that has nothing in
        common with the others may need so much that what they have equal costs less in each of
        their places than beside them.
        """
        contents = {
            n: {e.name: content_of(store, n, e) for e in entries(shape_of(store, n))} for n in names
        }
        having = Counter(content for each in contents.values() for content in set(each.values()))
        equal = {content for content, count in having.items() if count > 1}

        def elements(equal: Collection[Content]) -> int:
            common: dict[Content, int] = {}
            largest = max((t.layout.elements for t in kept), default=0)
            for name in names:
                elsewhere = [
                    e for e in entries(shape_of(store, name)) if contents[name][e.name] in equal
                ]
                common |= {contents[name][e.name]: e.elements for e in elsewhere}
                layout = FlatLayout.of(shape_of(store, name), [e.name for e in elsewhere])
                largest = max(largest, layout.elements)
            return capacity * largest + sum(common.values())

        if elements(equal) > elements(()):
            equal = set()
        return {name: self._on_host(store, name, contents[name], equal) for name in names}

    def _on_host(
        self, store: Store, name: str, contents: dict[str, Content], equal: set[Content]
    ) -> _HostTenant:
        """A tenant's weights in a flat buffer, pinned where the device is a CUDA one, but for those
        that it has in common with others.

        contents: of its entries. equal: of entries that several tenants have.
        """
        shape = shape_of(store, name)
        common: dict[str, PlainWeight] = {}
        for entry in entries(shape):
            content = contents[entry.name]
            if content not in equal and content not in self._common:
                continue
            if (held := self._common.get(content)) is None:
                held = PlainWeight(torch.empty(entry.shape, dtype=self._dtype, device=self._device))
                _fill(held.tensor, mapped_entry(store, name, entry))
                self._common[content] = held
            common[entry.name] = held
        layout = FlatLayout.of(shape, common)
        host = torch.zeros(
            layout.elements, dtype=self._dtype, pin_memory=self._device.type == "cuda"
        )
        views = layout.views(shape, host)
        for entry in entries(shape):
            if entry.name in views:
                _fill(views[entry.name], mapped_entry(store, name, entry))
        return _HostTenant(
            shape, layout, host, RotaryTable(shape, self._dtype, self._device), common
        )

    def update(self, store: Store, capacity: int) -> None:
        kept = unchanged(self._store, store)
        staying = [tenant for name, tenant in self._tenants.items() if name in kept]
        new = self._on_hosts(store, [n for n in store.tenants if n not in kept], capacity, staying)
        tenants = {n: self._tenants[n] if n in kept else new[n] for n in store.tenants}
        largest = max(t.layout.elements for t in tenants.values())
        if capacity != len(self._buffers) or largest > len(self._buffers[0].data):
            # Room first: where there is none, nothing has changed.
            buffers = [
                _DeviceBuffer(torch.empty(largest, dtype=self._dtype, device=self._device))
                for _ in range(capacity)
            ]
            if self._stream is not None:
                # A prefetch may still write to the old ones, whose memory others get now.
                torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._order.clear()
            self._buffers = buffers
        for name in [n for n in self._order if n not in kept]:
            buffer = self._order.pop(name)
            buffer.tenant = buffer.weights = None
        self._store, self._tenants, self.capacity = store, tenants, capacity
        self._last = frozenset(n for n in self._last if n in self._order)
        self._untold.intersection_update(tenants)

    def prefetch(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._order:
                continue
            busy = self._last | set(names)
            if all(b.tenant is not None for b in self._buffers) and all(
                n in busy for n in self._order
            ):
                return
            self._order[name] = self._copy(name, self._free_buffer(list(busy)))
            self._order.move_to_end(name)

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        wanted = list(dict.fromkeys(names))
        assert len(wanted) <= self.capacity
        # What a prefetch measured is told when its tenant comes into use.
        self._untold |= {n for n in wanted if n not in self._last}
        found = {}
        for name in wanted:
            if name not in self._order:
                self._order[name] = self._copy(name, self._free_buffer(wanted))
            if name not in self._last:
                self.switches += 1
            self._order.move_to_end(name)
            weights = self._order[name].weights
            assert weights is not None
            found[name] = weights
        self._last = frozenset(wanted)
        return found

    def _free_buffer(self, wanted: list[str]) -> _DeviceBuffer:
        for buffer in self._buffers:
            if buffer.tenant is None:
                return buffer
        return self._order.pop(next(n for n in self._order if n not in wanted))

    def _copy(self, name: str, buffer: _DeviceBuffer) -> _DeviceBuffer:
        tenant = self._tenants[name]
        shape, layout, host = tenant.shape, tenant.layout, tenant.host
        start = 0
        if self._stream is None:
            begun = time.perf_counter()
            buffer.data[: layout.elements].copy_(host)
            self._timers[name] = time.perf_counter() - begun
            arrived: list[torch.cuda.Event] = []
        else:
            # Kernels already issued may still read what lies in this buffer.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            arrived = []
            with torch.cuda.stream(self._stream):
                begin.record()
                for stop in layout.stage_ends:
                    buffer.data[start:stop].copy_(host[start:stop], non_blocking=True)
                    event = torch.cuda.Event()
                    event.record()
                    arrived.append(event)
                    start = stop
                end.record()
            self._timers[name] = (begin, end)
        self.copied_bytes += layout.elements * host.element_size()

        def wait(stage: int) -> None:
            if arrived:
                torch.cuda.current_stream(self._device).wait_event(arrived[stage])

        buffer.tenant = name
        views = layout.views(shape, buffer.data)
        weights = {name: PlainWeight(view) for name, view in views.items()} | tenant.common

        def weight(entry: Entry) -> Tensor | PlainWeight:
            found = weights[entry.name]
            return found if entry.is_matrix else found.tensor

        buffer.weights = arrange(shape, weight, tenant.rotary, wait)
        return buffer

    def seconds(self) -> dict[str, float]:
        found = {}
        for name in list(self._untold):
            timer = self._timers.get(name, 0.0)
            if isinstance(timer, float):
                found[name] = timer
            elif timer[1].query():
                found[name] = timer[0].elapsed_time(timer[1]) / 1e3
            else:
                continue  # told after a later step: waiting would hold up this one
            self._untold.discard(name)
            self._timers.pop(name, None)
        return found

    @property
    def ready(self) -> list[str]:
        return list(self._order)

    @property
    def device_bytes(self) -> int:
        return sum(b.data.nbytes for b in self._buffers) + sum(
            t.nbytes for t in self._common.values()
        )

    def close(self) -> None:
        self._order.clear()
        self._buffers.clear()
        self._tenants.clear()


def _fill(entry: Tensor, parts: Iterable[Tensor]) -> None:
    """Stack tensors along the first axis, into memory that is there."""
    start = 0
    for part in parts:
        entry[start : start + len(part)].copy_(part)
        start += len(part)
