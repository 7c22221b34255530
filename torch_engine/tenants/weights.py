"""A tenant's non-expert weights: what each layer computes with, and where it comes from in the
store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from common.families import Decoder
from common.families.shape import Dense, non_expert_dims
from common.store import Store
from torch_engine import native
from torch_engine.layers.rotary import RotaryTable
from torch_engine.products import Weight, as_tensor

# Roles that are computed as one product, along their first axis.
STACKS = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "dense_gate_up": ("dense_gate", "dense_up"),
}
_STACK_OF = {role: (stack, i) for stack, roles in STACKS.items() for i, role in enumerate(roles)}

# What rows of tokens are multiplied with; the rest is added, looked up or scales.
_MATRICES = frozenset({"qkv", "o", "router", "dense_gate_up", "dense_down", "head"})


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights by role, None where its model has none.

    qkv: [(heads + 2 * kv_heads) * head_dim, hidden]; dense_gate_up: [2 * inner, hidden]. The others
    have the dimensions of `common.families.shape.non_expert_dims`.
    """

    input_norm: Tensor
    qkv: Weight
    o: Weight
    post_norm: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    router: Weight | None = None
    dense_gate_up: Weight | None = None
    dense_down: Weight | None = None


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

    def inner(self, layer: int) -> int:
        """Inner size of a layer without experts."""
        mlp = self.shape.layers[layer]
        assert isinstance(mlp, Dense)
        return mlp.inner

    def all(self) -> Iterator[Tensor | Weight]:
        """Everything."""
        yield self.embed
        for layer in self.layers:
            each = (getattr(layer, f.name) for f in fields(layer))
            yield from (weight for weight in each if weight is not None)
        yield from (self.norm, self.head)


@dataclass(frozen=True)
class Entry:
    """One tensor of `TenantWeights`: a stack of tensors along their first axis, needed at a stage.

    role: of `LayerWeights`, or embed, norm or head. sources: the roles that it stacks.
    """

    role: str
    layer: int | None
    stage: int
    sources: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unlike any other entry's."""
        return self.role if self.layer is None else f"{self.layer}.{self.role}"

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with."""
        return self.role in _MATRICES

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def entries(shape: Decoder) -> list[Entry]:
    """All of a tenant's non-expert tensors in the order of computation."""
    found: dict[tuple[str, int | None], Entry] = {}
    last = len(shape.layers) + 1
    for role, layer, dims in non_expert_dims(shape):
        stack, index = _STACK_OF.get(role, (role, 0))
        if index:
            before = found[stack, layer]
            dims = (before.shape[0] + dims[0], *dims[1:])
        stage = layer + 1 if layer is not None else 0 if role == "embed" else last
        found[stack, layer] = Entry(stack, layer, stage, STACKS.get(stack, (role,)), dims)
    return list(found.values())


def arrange(
    shape: Decoder,
    weight: Callable[[Entry], Tensor | Weight],
    rotary: RotaryTable,
    wait: Callable[[int], None] = lambda stage: None,
) -> TenantWeights:
    """Make a tenant's weights of what `weight` gives for each entry: a `Weight` for matrices."""
    layers: list[dict[str, Tensor | Weight]] = [{} for _ in shape.layers]
    whole: dict[str, Tensor | Weight] = {}
    for entry in entries(shape):
        where = whole if entry.layer is None else layers[entry.layer]
        where[entry.role] = weight(entry)
    head = whole.pop("head")
    assert isinstance(head, Weight)
    tables = {role: tensor for role, tensor in whole.items() if isinstance(tensor, Tensor)}
    made = tuple(LayerWeights(**each) for each in layers)  # type: ignore[arg-type]
    return TenantWeights(
        shape, tables["embed"], made, tables["norm"], head, rotary, head.kernels, wait
    )


Content = tuple[str, ...]
"""What an entry holds: the hashes of the tensors that it stacks."""


def content_of(store: Store, tenant: str, entry: Entry) -> Content:
    """Equal for entries of equal weights, whichever layer's or tenant's."""
    tensors = store.tenant(tenant).tensors
    return tuple(tensors[store.role_tensor(tenant, r, entry.layer)] for r in entry.sources)


def mapped_entry(store: Store, tenant: str, entry: Entry) -> list[Tensor]:
    """The mapped tensors that an entry stacks."""
    names = [store.role_tensor(tenant, role, entry.layer) for role in entry.sources]
    return [as_tensor(store.ref(tenant, name).map()) for name in names]


def shape_of(store: Store, tenant: str) -> Decoder:
    """The shape of a tenant that this engine serves."""
    shape = store.config(tenant).shape
    assert isinstance(shape, Decoder)
    return shape
