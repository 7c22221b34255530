"""Which experts each row has, and rows in the order of their experts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(
    logits,
    tenants,
    slots,
    residuals,
    keys,
    gates,
    numbers,
    E,
    TOP: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROUND: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's experts: keys int32 [M * TOP], their slots (-1 of padding), and gates float32.

    numbers: int32 [M * TOP], what residual the tenant has there. logits: [M, E]. slots, residuals:
    int64 [tenants, E], `ExpertPool.keys` and `ResidentResiduals.numbers` of a layer.
    """
    row = tl.program_id(0)
    tenant = tl.load(tenants + row)
    e = tl.arange(0, BLOCK)
    if tenant < 0:
        for i in tl.static_range(TOP):
            tl.store(keys + row * TOP + i, -1)
            tl.store(numbers + row * TOP + i, 0)
    else:
        left = tl.load(logits + row * E + e, mask=e < E, other=-float("inf")).to(tl.float32)
        highest = tl.max(left, 0)
        everything = tl.sum(tl.exp(left - highest), 0)
        t = tl.arange(0, TOP_BLOCK)
        weights = tl.zeros((TOP_BLOCK,), tl.float32)
        experts = tl.zeros((TOP_BLOCK,), tl.int32)
        for i in tl.static_range(TOP):
            best = tl.argmax(left, 0)
            weights = tl.where(t == i, tl.exp(tl.max(left, 0) - highest), weights)
            experts = tl.where(t == i, best, experts)
            left = tl.where(e == best, -float("inf"), left)
        if RENORMALISE:
            weights = weights / tl.sum(weights, 0)
        else:
            weights = weights / everything
        if ROUND:
            weights = weights.to(logits.dtype.element_ty).to(tl.float32)
        found = tl.load(slots + tenant * E + experts, mask=t < TOP, other=0)
        tl.store(keys + row * TOP + t, found.to(tl.int32), mask=t < TOP)
        tl.store(gates + row * TOP + t, weights, mask=t < TOP)
        found = tl.load(residuals + tenant * E + experts, mask=t < TOP, other=0)
        tl.store(numbers + row * TOP + t, found.to(tl.int32), mask=t < TOP)


@triton.jit
def sort(
    keys,
    numbers,
    order,
    starts,
    COUNT,
    SLOTS,
    BLOCK: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """order int32 [COUNT]: rows by slot and, in a slot, by residual.

    starts: int32 [SLOTS + 1], where each slot's begin. keys: int32 [COUNT], slots, -1 for rows that
    are left out. numbers: int32 [COUNT], residuals. A program for all: COUNT is small.
    """
    i = tl.arange(0, BLOCK)
    mine = tl.load(keys + i, mask=i < COUNT, other=-1)
    residual = tl.load(numbers + i, mask=i < COUNT, other=0)
    s = tl.arange(0, SLOTS_BLOCK)
    rank = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((SLOTS_BLOCK,), tl.int32)
    for first in range(0, COUNT, STEP):
        j = first + tl.arange(0, STEP)
        other = tl.load(keys + j, mask=j < COUNT, other=-1)
        theirs = tl.load(numbers + j, mask=j < COUNT, other=0)
        earlier = (theirs[None, :] < residual[:, None]) | (
            (theirs[None, :] == residual[:, None]) & (j[None, :] < i[:, None])
        )
        smaller = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & earlier)
        rank += tl.sum((smaller & (other >= 0)[None, :]).to(tl.int32), 1)
        before += tl.sum(((other[None, :] < s[:, None]) & (other >= 0)[None, :]).to(tl.int32), 1)
    tl.store(order + rank, i, mask=(i < COUNT) & (mine >= 0))
    tl.store(starts + s, before, mask=s <= SLOTS)
