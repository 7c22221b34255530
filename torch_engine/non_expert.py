"""Tenants' non-expert weights: what a layer needs of them, and which tenants' are ready on the device
(reconfiguration).

On a CPU every ready tenant's weights stay where they are, so a switch copies nothing. On CUDA each tenant is one flat
pinned host buffer; a switch is a few large copies on a stream of their own, layer by layer, and nothing is copied
back: weights never change.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from common.families import MixtralConfig
from common.store import Store
from torch_engine import native
from torch_engine.products import PackedWeight, Weight, as_tensor
from torch_engine.rotary import RotaryTable


@dataclass(frozen=True)
class LayerWeights:
    """input_norm, post_norm: [hidden]; qkv: [(heads + 2 * kv_heads) * head_dim, hidden]; o: [hidden, heads * head_dim];
    router: [experts, hidden]."""

    input_norm: Tensor
    qkv: Weight
    o: Weight
    post_norm: Tensor
    router: Weight


@dataclass(frozen=True)
class TenantWeights:
    """One tenant's non-expert weights in the form that the model computes with. embed, head: [vocab, hidden]."""

    config: MixtralConfig
    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Weight
    rotary: RotaryTable
    kernels: native.Kernels | None = None
    """Our own kernels for norms and decode attention, where the products use them too."""
    wait: Callable[[int], None] = field(default=lambda stage: None)
    """Called before stage 0 (embedding), 1..layers, layers + 1 (head) is used: waits for its copy on CUDA."""


@dataclass(frozen=True)
class Entry:
    """One tensor of `TenantWeights`: a stack of canonical tensors along their first axis, needed at a stage."""

    name: str
    stage: int
    sources: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def entries(config: MixtralConfig) -> list[Entry]:
    """All of a tenant's non-expert tensors in the order of computation."""
    hidden, heads, kv = config.experts.hidden_size, config.num_attention_heads, config.num_key_value_heads
    dim, vocab = config.head_dim, config.vocab_size
    found = [Entry("embed", 0, ("model.embed_tokens.weight",), (vocab, hidden))]
    for n, layer in enumerate(config.experts.expert_layers):
        attention = f"{layer}.self_attn"
        qkv = tuple(f"{attention}.{p}_proj.weight" for p in "qkv")
        router = f"{layer}.block_sparse_moe.gate.weight"
        found += [
            Entry(f"{n}.input_norm", n + 1, (f"{layer}.input_layernorm.weight",), (hidden,)),
            Entry(f"{n}.qkv", n + 1, qkv, ((heads + 2 * kv) * dim, hidden)),
            Entry(f"{n}.o", n + 1, (f"{attention}.o_proj.weight",), (hidden, heads * dim)),
            Entry(f"{n}.post_norm", n + 1, (f"{layer}.post_attention_layernorm.weight",), (hidden,)),
            Entry(f"{n}.router", n + 1, (router,), (config.experts.num_experts, hidden)),
        ]
    last = len(config.experts.expert_layers) + 1
    found.append(Entry("norm", last, ("model.norm.weight",), (hidden,)))
    found.append(Entry("head", last, ("lm_head.weight",), (vocab, hidden)))
    return found


def arrange(
    config: MixtralConfig,
    tensors: dict[str, Tensor],
    product: Callable[[Tensor], Weight],
    rotary: RotaryTable,
    wait: Callable[[int], None] = lambda stage: None,
) -> TenantWeights:
    """Entries by name -> TenantWeights; `product` prepares the matrices that are multiplied with."""
    layers = tuple(
        LayerWeights(
            tensors[f"{n}.input_norm"],
            product(tensors[f"{n}.qkv"]),
            product(tensors[f"{n}.o"]),
            tensors[f"{n}.post_norm"],
            product(tensors[f"{n}.router"]),
        )
        for n in range(config.experts.num_layers)
    )
    head = product(tensors["head"])
    kernels = head.kernels if isinstance(head, PackedWeight) else None
    return TenantWeights(config, tensors["embed"], layers, tensors["norm"], head, rotary, kernels, wait)


def mapped_entry(store: Store, tenant: str, entry: Entry) -> list[Tensor]:
    """The mapped tensors that an entry stacks."""
    return [as_tensor(store.ref(tenant, source).map()) for source in entry.sources]


def unchanged(old: Store, new: Store) -> set[str]:
    """Tenants that both stores have with the same non-expert weights."""
    return {n for n in old.tenants if n in new.tenants and old.tenant_content(n) == new.tenant_content(n)}


class ReadyTenants(Protocol):
    """Which tenants' weights the device can compute with now."""

    capacity: int
    switches: int
    copied_bytes: int
    switched: list[str]
    """What the last `acquire` named and the one before it did not."""

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        """Make these tenants ready, at most `capacity` of them; others may be dropped, least recently used first."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to make tenants ready without waiting, where there is a place that the last `acquire` left free."""
        ...

    def update(self, store: Store, capacity: int) -> None:
        """Serve another store's tenants; those that did not change stay ready. Nothing changes if this raises."""
        ...

    def seconds(self, name: str) -> float:
        """What the last `acquire` spent on a tenant; on CUDA, call it after a synchronisation."""
        ...

    @property
    def ready(self) -> list[str]:
        """Names, least recently used first."""
        ...

    @property
    def device_bytes(self) -> int: ...

    def close(self) -> None: ...


class TenantsInPlace:
    """Tenants on a device whose memory is the host's: made ready once, then switched by reference."""

    def __init__(self, store: Store, dtype: torch.dtype, capacity: int, product: Callable[[Tensor], Weight]):
        self._store, self._dtype, self._product = store, dtype, product
        self.capacity = capacity
        self.switches = 0
        self.copied_bytes = 0
        self.switched: list[str] = []
        self._last: frozenset[str] = frozenset()
        self._ready: OrderedDict[str, TenantWeights] = OrderedDict()
        self._seconds: dict[str, float] = {}
        for name in store.tenants[:capacity]:
            self._ready[name] = self._load(store, name)

    def update(self, store: Store, capacity: int) -> None:
        kept = [n for n in self._ready if n in unchanged(self._store, store)]
        new = [n for n in store.tenants if n not in kept][: max(0, capacity - len(kept))]
        loaded = {name: self._load(store, name) for name in new}
        self._store, self.capacity = store, capacity
        ready = {**{n: self._ready[n] for n in kept}, **loaded}
        self._ready = OrderedDict(list(ready.items())[-capacity:])
        self._last = frozenset(n for n in self._last if n in kept)

    def _load(self, store: Store, name: str) -> TenantWeights:
        config = store.config(name)
        assert isinstance(config, MixtralConfig)
        tensors = {}
        for entry in entries(config):
            parts = mapped_entry(store, name, entry)
            tensors[entry.name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self._dtype)
        return arrange(config, tensors, self._product, RotaryTable(config, self._dtype, torch.device("cpu")))

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        wanted = list(dict.fromkeys(names))
        assert len(wanted) <= self.capacity
        self._seconds = {}
        self.switched = [n for n in wanted if n not in self._last]
        found = {}
        for name in wanted:
            start = time.perf_counter()
            if name not in self._ready:
                while len(self._ready) >= self.capacity:
                    self._ready.pop(next(n for n in self._ready if n not in wanted))
                self._ready[name] = self._load(self._store, name)
                self.copied_bytes += sum(e.elements for e in entries(self._ready[name].config)) * self._dtype.itemsize
            self._ready.move_to_end(name)
            found[name] = self._ready[name]
            if name not in self._last:
                self.switches += 1
                self._seconds[name] = time.perf_counter() - start
        self._last = frozenset(wanted)
        return found

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing: weights that are not ready are read and packed by the processor that computes."""

    def seconds(self, name: str) -> float:
        return self._seconds.get(name, 0.0)

    @property
    def ready(self) -> list[str]:
        return list(self._ready)

    @property
    def device_bytes(self) -> int:
        elements = sum(e.elements for w in self._ready.values() for e in entries(w.config))
        return elements * self._dtype.itemsize

    def close(self) -> None:
        self._ready.clear()


ALIGNMENT = (
    128  # elements: offsets stay multiples of 256 bytes, which every vector load and tensor-core product accepts
)


@dataclass(frozen=True)
class FlatLayout:
    """Where each entry lies in a tenant's flat buffer, and where each stage ends; in elements."""

    offsets: dict[str, int]
    stage_ends: tuple[int, ...]

    @classmethod
    def of(cls, config: MixtralConfig) -> FlatLayout:
        offsets: dict[str, int] = {}
        ends = [0] * (config.experts.num_layers + 2)
        position = 0
        for entry in entries(config):
            offsets[entry.name] = position
            position += -(-entry.elements // ALIGNMENT) * ALIGNMENT
            ends[entry.stage] = position
        return cls(offsets, tuple(ends))

    @property
    def elements(self) -> int:
        return self.stage_ends[-1]

    def views(self, config: MixtralConfig, buffer: Tensor) -> dict[str, Tensor]:
        """Each entry as a view of a flat buffer."""
        return {
            e.name: buffer[self.offsets[e.name] : self.offsets[e.name] + e.elements].view(e.shape)
            for e in entries(config)
        }


@dataclass
class _DeviceBuffer:
    """One tenant-sized place on the device."""

    data: Tensor
    tenant: str | None = None
    weights: TenantWeights | None = None


@dataclass(frozen=True)
class _HostTenant:
    """One tenant's weights on the host; host: [layout.elements]."""

    config: MixtralConfig
    layout: FlatLayout
    host: Tensor
    rotary: RotaryTable


class TenantsByCopy:
    """Tenants in flat host buffers, of which `capacity` are copied to device buffers, least recently used first out.

    Works on any device, for tests; on CUDA host buffers are pinned, copies run on their own stream with an event a
    stage, and the computation waits for a stage only when it gets there.
    """

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, capacity: int):
        self._dtype, self._device = dtype, device
        self.capacity = capacity
        self.switches = 0
        self.copied_bytes = 0
        self._store = store
        self._tenants = {name: self._on_host(store, name) for name in store.tenants}
        largest = max(t.layout.elements for t in self._tenants.values())
        self._buffers = [_DeviceBuffer(torch.empty(largest, dtype=dtype, device=device)) for _ in range(capacity)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._order: OrderedDict[str, _DeviceBuffer] = OrderedDict()
        self._timers: dict[str, tuple[torch.cuda.Event, torch.cuda.Event] | float] = {}
        self.switched: list[str] = []
        self._last: frozenset[str] = frozenset()

    def _on_host(self, store: Store, name: str) -> _HostTenant:
        """A tenant's weights in a flat buffer, pinned where the device is a CUDA one."""
        config = store.config(name)
        assert isinstance(config, MixtralConfig)
        layout = FlatLayout.of(config)
        host = torch.zeros(layout.elements, dtype=self._dtype, pin_memory=self._device.type == "cuda")
        views = layout.views(config, host)
        for entry in entries(config):
            start = 0
            for part in mapped_entry(store, name, entry):
                views[entry.name][start : start + len(part)].copy_(part)
                start += len(part)
        return _HostTenant(config, layout, host, RotaryTable(config, self._dtype, self._device))

    def update(self, store: Store, capacity: int) -> None:
        kept = unchanged(self._store, store)
        tenants = {n: self._tenants[n] if n in kept else self._on_host(store, n) for n in store.tenants}
        largest = max(t.layout.elements for t in tenants.values())
        if capacity != len(self._buffers) or largest > len(self._buffers[0].data):
            self._order.clear()
            self._buffers = [
                _DeviceBuffer(torch.empty(largest, dtype=self._dtype, device=self._device)) for _ in range(capacity)
            ]
        for name in [n for n in self._order if n not in kept]:
            buffer = self._order.pop(name)
            buffer.tenant = buffer.weights = None
        self._store, self._tenants, self.capacity = store, tenants, capacity
        self._last = frozenset(n for n in self._last if n in self._order)

    def prefetch(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._order:
                continue
            busy = self._last | set(names)
            if all(b.tenant is not None for b in self._buffers) and all(n in busy for n in self._order):
                return
            self._order[name] = self._copy(name, self._free_buffer(list(busy)))
            self._order.move_to_end(name)

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        wanted = list(dict.fromkeys(names))
        assert len(wanted) <= self.capacity
        self.switched = [n for n in wanted if n not in self._last]
        # What a prefetch measured is told when its tenant comes into use.
        self._timers = {n: t for n, t in self._timers.items() if n in self.switched or n not in self._last}
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
        config, layout, host = tenant.config, tenant.layout, tenant.host
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
        views = layout.views(config, buffer.data)
        buffer.weights = arrange(config, views, lambda w: w, tenant.rotary, wait)
        return buffer

    def seconds(self, name: str) -> float:
        timer = self._timers.get(name, 0.0)
        return timer if isinstance(timer, float) else timer[0].elapsed_time(timer[1]) / 1e3

    @property
    def ready(self) -> list[str]:
        return list(self._order)

    @property
    def device_bytes(self) -> int:
        return sum(b.data.numel() * b.data.element_size() for b in self._buffers)

    def close(self) -> None:
        self._order.clear()
        self._buffers.clear()
        self._tenants.clear()
