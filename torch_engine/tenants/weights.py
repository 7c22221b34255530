"""A tenant's non-expert weights: what each layer computes with, and where it comes from in the
store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.families import Decoder
from common.store import Store
from torch_engine import native
from torch_engine.layers.rotary import RotaryTable
from torch_engine.products import PackedWeight, Weight, as_tensor


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

    shape: Decoder
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

    def all(self) -> Iterator[Weight]:
        """Every tensor."""
        yield self.embed
        for layer in self.layers:
            yield from (layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.router)
        yield from (self.norm, self.head)


@dataclass(frozen=True)
class Entry:
    """One tensor of `TenantWeights`: a stack of tensors along their first axis, needed at a stage.

    sources: role and layer of each.
    """

    name: str
    stage: int
    sources: tuple[tuple[str, int | None], ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def entries(shape: Decoder) -> list[Entry]:
    """All of a tenant's non-expert tensors in the order of computation."""
    hidden, a, table = shape.hidden, shape.attention, (shape.vocab_size, shape.hidden)
    found = [Entry("embed", 0, (("embed", None),), table)]
    for n in range(len(shape.layers)):
        qkv = tuple((role, n) for role in "qkv")
        found += [
            Entry(f"{n}.input_norm", n + 1, (("input_norm", n),), (hidden,)),
            Entry(f"{n}.qkv", n + 1, qkv, ((a.heads + 2 * a.kv_heads) * a.head_dim, hidden)),
            Entry(f"{n}.o", n + 1, (("o", n),), (hidden, a.heads * a.head_dim)),
            Entry(f"{n}.post_norm", n + 1, (("post_norm", n),), (hidden,)),
            Entry(f"{n}.router", n + 1, (("router", n),), (shape.experts.count, hidden)),
        ]
    last = len(shape.layers) + 1
    found.append(Entry("norm", last, (("norm", None),), (hidden,)))
    found.append(Entry("head", last, (("head", None),), table))
    return found


def arrange(
    shape: Decoder,
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
        for n in range(len(shape.layers))
    )
    head = product("head")
    kernels = head.kernels if isinstance(head, PackedWeight) else None
    return TenantWeights(
        shape, tensor("embed"), layers, tensor("norm"), head, rotary, kernels, wait
    )


Content = tuple[str, ...]
"""What an entry holds: the hashes of the tensors that it stacks."""


def content_of(store: Store, tenant: str, entry: Entry) -> Content:
    """Equal for entries of equal weights, whichever layer's or tenant's."""
    tensors = store.tenant(tenant).tensors
    return tuple(tensors[store.role_tensor(tenant, *source)] for source in entry.sources)


def mapped_entry(store: Store, tenant: str, entry: Entry) -> list[Tensor]:
    """The mapped tensors that an entry stacks."""
    return [
        as_tensor(store.ref(tenant, store.role_tensor(tenant, *source)).map())
        for source in entry.sources
    ]


def shape_of(store: Store, tenant: str) -> Decoder:
    """The shape of a tenant that this engine serves."""
    shape = store.config(tenant).shape
    assert isinstance(shape, Decoder)
    return shape
