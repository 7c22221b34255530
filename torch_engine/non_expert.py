"""Tenants' non-expert weights: what a layer needs of them, and which tenants' are ready on the
device (reconfiguration).

On a CPU every ready tenant's weights stay where they are, so a switch copies nothing. On CUDA each
tenant is one flat pinned host buffer; a switch is a few large copies on a stream of their own,
layer by layer, and nothing is copied
back: weights never change.

Fine-tunes often leave part of this as it was: adapters that touch attention alone leave embeddings,
norms and head. Such weights, equal by content, are held once for all tenants that have them, and a
switch does not copy them.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from common.families import MixtralConfig
from common.store import Store
from torch_engine import native
from torch_engine.products import PlainWeight, Weight, as_tensor
from torch_engine.rotary import RotaryTable


@dataclass(frozen=True)
class LayerWeights:
    """input_norm, post_norm: [hidden]; qkv: [(heads + 2 * kv_heads) * head_dim, hidden]; o:
    [hidden, heads * head_dim];
    router: [experts, hidden]."""

    input_norm: Tensor
    qkv: Weight
    o: Weight
    post_norm: Tensor
    router: Weight


@dataclass(frozen=True)
class TenantWeights:
    """One tenant's non-expert weights in the form that the model computes with. embed, head:
    [vocab, hidden]."""

    config: MixtralConfig
    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Weight
    rotary: RotaryTable
    kernels: native.Kernels | None = None
    """Our own kernels for norms and decode attention, where the products use them too."""
    wait: Callable[[int], None] = field(default=lambda stage: None)
    """Called before stage 0 (embedding), 1..layers, layers + 1 (head) is used: waits for its copy
    on CUDA."""

    def all(self) -> Iterator[Tensor | Weight]:
        """Everything."""
        yield self.embed
        for layer in self.layers:
            yield from (layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.router)
        yield from (self.norm, self.head)


@dataclass(frozen=True)
class Entry:
    """One tensor of `TenantWeights`: a stack of canonical tensors along their first axis, needed at
    a stage."""

    name: str
    stage: int
    sources: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def entries(config: MixtralConfig) -> list[Entry]:
    """All of a tenant's non-expert tensors in the order of computation."""
    hidden, heads, kv = (
        config.experts.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
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
            Entry(
                f"{n}.post_norm", n + 1, (f"{layer}.post_attention_layernorm.weight",), (hidden,)
            ),
            Entry(f"{n}.router", n + 1, (router,), (config.experts.num_experts, hidden)),
        ]
    last = len(config.experts.expert_layers) + 1
    found.append(Entry("norm", last, ("model.norm.weight",), (hidden,)))
    found.append(Entry("head", last, ("lm_head.weight",), (vocab, hidden)))
    return found


def arrange(
    config: MixtralConfig,
    tensor: Callable[[str], Tensor],
    product: Callable[[str], Weight],
    rotary: RotaryTable,
    wait: Callable[[int], None] = lambda stage: None,
) -> TenantWeights:
    """Entries by name -> TenantWeights; `product` gives the matrices that are multiplied with,
    `tensor` the others."""
    layers = tuple(
        LayerWeights(
            tensor(f"{n}.input_norm"),
            product(f"{n}.qkv"),
            product(f"{n}.o"),
            tensor(f"{n}.post_norm"),
            product(f"{n}.router"),
        )
        for n in range(config.experts.num_layers)
    )
    head = product("head")
    return TenantWeights(
        config, tensor("embed"), layers, tensor("norm"), head, rotary, head.kernels, wait
    )


Content = tuple[str, ...]
"""What an entry holds: the hashes of the tensors that it stacks."""


def content_of(store: Store, tenant: str, entry: Entry) -> Content:
    """Equal for entries of equal weights, whichever layer's or tenant's."""
    tensors = store.tenant(tenant).tensors
    return tuple(tensors[source] for source in entry.sources)


def mapped_entry(store: Store, tenant: str, entry: Entry) -> list[Tensor]:
    """The mapped tensors that an entry stacks."""
    return [as_tensor(store.ref(tenant, source).map()) for source in entry.sources]


def _config(store: Store, tenant: str) -> MixtralConfig:
    config = store.config(tenant)
    assert isinstance(config, MixtralConfig)
    return config


def _fill(entry: Tensor, parts: Iterable[Tensor]) -> None:
    """Stack tensors along the first axis, into memory that is there."""
    start = 0
    for part in parts:
        entry[start : start + len(part)].copy_(part)
        start += len(part)


def unchanged(old: Store, new: Store) -> set[str]:
    """Tenants that both stores have with the same non-expert weights."""
    return {
        n
        for n in old.tenants
        if n in new.tenants and old.tenant_content(n) == new.tenant_content(n)
    }


class ReadyTenants(Protocol):
    """Which tenants' weights the device can compute with now."""

    capacity: int
    switches: int
    copied_bytes: int
    switched: list[str]
    """What the last `acquire` named and the one before it did not."""

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        """Make these tenants ready, at most `capacity` of them; others may be dropped, least
        recently used first."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to make tenants ready without waiting, where there is a place that the last
        `acquire` left free."""
        ...

    def update(self, store: Store, capacity: int) -> None:
        """Serve another store's tenants; those that did not change stay ready. Nothing changes if
        this raises."""
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
    """Tenants on a device whose memory is the host's: made ready once, then switched by
    reference."""

    def __init__(
        self, store: Store, dtype: torch.dtype, capacity: int, product: Callable[[Tensor], Weight]
    ):
        self._store, self._dtype, self._product = store, dtype, product
        self.capacity = capacity
        self.switches = 0
        self.copied_bytes = 0
        self.switched: list[str] = []
        self._last: frozenset[str] = frozenset()
        self._ready: OrderedDict[str, TenantWeights] = OrderedDict()
        self._seconds: dict[str, float] = {}
        self._made: WeakValueDictionary[tuple[bool, Content], Tensor | Weight] = (
            WeakValueDictionary()
        )
        self._made_bytes = 0
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
        config = _config(store, name)
        by_name = {entry.name: entry for entry in entries(config)}

        def stacked(entry: str) -> Tensor:
            parts = mapped_entry(store, name, by_name[entry])
            return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self._dtype)

        def once(entry: str, multiplied: bool) -> Tensor | Weight:
            key = multiplied, content_of(store, name, by_name[entry])
            made = self._made.get(key)
            if made is None:
                made = self._product(stacked(entry)) if multiplied else stacked(entry)
                self._made[key] = made
                self._made_bytes += made.nbytes
            return made

        def tensor(entry: str) -> Tensor:
            found = once(entry, False)
            assert isinstance(found, Tensor)
            return found

        def product(entry: str) -> Weight:
            found = once(entry, True)
            assert isinstance(found, Weight)
            return found

        rotary = RotaryTable(config, self._dtype, torch.device("cpu"))
        return arrange(config, tensor, product, rotary)

    def _held_for(self, name: str) -> list[Tensor | Weight | None]:
        """What of a tenant's weights is there, as others have it too."""
        contents = [
            content_of(self._store, name, entry) for entry in entries(_config(self._store, name))
        ]
        return [
            self._made.get((multiplied, content))
            for content in contents
            for multiplied in (False, True)
        ]

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        wanted = list(dict.fromkeys(names))
        assert len(wanted) <= self.capacity
        self._seconds = {}
        self.switched = [n for n in wanted if n not in self._last]
        found = {}
        for name in wanted:
            start = time.perf_counter()
            if name not in self._ready:
                equal = self._held_for(name)  # before who else has it goes
                while len(self._ready) >= self.capacity:
                    self._ready.pop(next(n for n in self._ready if n not in wanted))
                before = self._made_bytes
                self._ready[name] = self._load(self._store, name)
                self.copied_bytes += self._made_bytes - before
                del equal
            self._ready.move_to_end(name)
            found[name] = self._ready[name]
            if name not in self._last:
                self.switches += 1
                self._seconds[name] = time.perf_counter() - start
        self._last = frozenset(wanted)
        return found

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing: weights that are not ready are read and packed by the processor that
        computes."""

    def seconds(self, name: str) -> float:
        return self._seconds.get(name, 0.0)

    @property
    def ready(self) -> list[str]:
        return list(self._ready)

    @property
    def device_bytes(self) -> int:
        held = {
            id(weight): weight.nbytes for tenant in self._ready.values() for weight in tenant.all()
        }
        return sum(held.values())

    def close(self) -> None:
        self._ready.clear()


# Elements: offsets stay multiples of 256 bytes, which every vector load and tensor-core product
# accepts.
ALIGNMENT = 128


@dataclass(frozen=True)
class FlatLayout:
    """Where each entry lies in a tenant's flat buffer, and where each stage ends; in elements."""

    offsets: dict[str, int]
    stage_ends: tuple[int, ...]

    @classmethod
    def of(cls, config: MixtralConfig, without: Collection[str] = ()) -> FlatLayout:
        """without: names of entries that lie elsewhere."""
        offsets: dict[str, int] = {}
        ends = [0] * (config.experts.num_layers + 2)
        position = 0
        for entry in entries(config):
            if entry.name not in without:
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
            if e.name in self.offsets
        }


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

    config: MixtralConfig
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
        self.switched: list[str] = []
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
            n: {e.name: content_of(store, n, e) for e in entries(_config(store, n))} for n in names
        }
        having = Counter(content for each in contents.values() for content in set(each.values()))
        equal = {content for content, count in having.items() if count > 1}

        def elements(equal: Collection[Content]) -> int:
            common: dict[Content, int] = {}
            largest = max((t.layout.elements for t in kept), default=0)
            for name in names:
                elsewhere = [
                    e for e in entries(_config(store, name)) if contents[name][e.name] in equal
                ]
                common |= {contents[name][e.name]: e.elements for e in elsewhere}
                layout = FlatLayout.of(_config(store, name), [e.name for e in elsewhere])
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
        config = _config(store, name)
        common: dict[str, PlainWeight] = {}
        for entry in entries(config):
            content = contents[entry.name]
            if content not in equal and content not in self._common:
                continue
            if (held := self._common.get(content)) is None:
                held = PlainWeight(torch.empty(entry.shape, dtype=self._dtype, device=self._device))
                _fill(held.tensor, mapped_entry(store, name, entry))
                self._common[content] = held
            common[entry.name] = held
        layout = FlatLayout.of(config, common)
        host = torch.zeros(
            layout.elements, dtype=self._dtype, pin_memory=self._device.type == "cuda"
        )
        views = layout.views(config, host)
        for entry in entries(config):
            if entry.name in views:
                _fill(views[entry.name], mapped_entry(store, name, entry))
        return _HostTenant(
            config, layout, host, RotaryTable(config, self._dtype, self._device), common
        )

    def update(self, store: Store, capacity: int) -> None:
        kept = unchanged(self._store, store)
        staying = [tenant for name, tenant in self._tenants.items() if name in kept]
        new = self._on_hosts(store, [n for n in store.tenants if n not in kept], capacity, staying)
        tenants = {n: self._tenants[n] if n in kept else new[n] for n in store.tenants}
        largest = max(t.layout.elements for t in tenants.values())
        if capacity != len(self._buffers) or largest > len(self._buffers[0].data):
            self._order.clear()
            self._buffers = [
                _DeviceBuffer(torch.empty(largest, dtype=self._dtype, device=self._device))
                for _ in range(capacity)
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
            if all(b.tenant is not None for b in self._buffers) and all(
                n in busy for n in self._order
            ):
                return
            self._order[name] = self._copy(name, self._free_buffer(list(busy)))
            self._order.move_to_end(name)

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        wanted = list(dict.fromkeys(names))
        assert len(wanted) <= self.capacity
        self.switched = [n for n in wanted if n not in self._last]
        # What a prefetch measured is told when its tenant comes into use.
        self._timers = {
            n: t for n, t in self._timers.items() if n in self.switched or n not in self._last
        }
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
        weights = {entry: PlainWeight(view) for entry, view in views.items()} | tenant.common
        buffer.weights = arrange(
            config, lambda e: weights[e].tensor, weights.__getitem__, tenant.rotary, wait
        )
        return buffer

    def seconds(self, name: str) -> float:
        timer = self._timers.get(name, 0.0)
        return timer if isinstance(timer, float) else timer[0].elapsed_time(timer[1]) / 1e3

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
