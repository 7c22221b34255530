"""The launches of a decode step, in order, with their block sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.families import Decoder
from torch_engine.decode.buffers import power_of_two
from torch_engine.decode.graph import StepGraph
from torch_engine.decode.kernels import attention, routing, rows
from torch_engine.decode.kernels.linear import linear as multiply
from torch_engine.experts.grouped_pool import GroupedPool
from torch_engine.layers.cache import BLOCK, Arena


def forward(
    shape: Decoder,
    graph: StepGraph,
    table: Callable[[str], Tensor],
    experts: Sequence[Tensor],
    pool: GroupedPool,
    cache: Arena,
) -> None:
    """Compute the step that lies in the graph's inputs: its winners and logits.

    table: addresses of each tenant's tensor of a name. experts: int64 [slots], addresses of gate_up
    and of down, layer by layer.
    """
    given, count, hidden = graph.inputs.on_device, graph.rows, shape.hidden
    tenants = given["tenants"]
    a, router = shape.attention, shape.experts.router
    exact = graph.x.dtype == torch.float32 or not graph.x.is_cuda
    wide = power_of_two(hidden)

    def norm(added: Tensor, top_k: int, name: str) -> None:
        rows.add_norm[(count,)](
            graph.x,
            added,
            graph.gates,
            tenants,
            table(name),
            graph.normed,
            shape.scalars.residual,
            shape.norm_eps,
            hidden,
            TOP=top_k,
            BLOCK=wide,
            num_warps=8,
        )

    def linear(x: Tensor, out: Tensor, name: str, outputs: int, inputs: int) -> None:
        cut = tile(outputs, False, exact)
        multiply[(-(-outputs // cut["BN"]), graph.groups)](
            x,
            out,
            table(name),
            given["columns"],
            graph.order,
            given["starts"],
            outputs,
            inputs,
            SHARE=1,
            SORTED=False,
            GATED=False,
            EXACT=exact,
            BM=16 if count <= 16 else 32,
            **cut,
        )

    def products(
        x: Tensor, out: Tensor, at: Tensor, outputs: int, inputs: int, share: int, gated: bool
    ) -> None:
        cut = tile(outputs, True, exact)
        multiply[(-(-outputs // cut["BN"]), len(at))](
            x,
            out,
            at,
            given["columns"],
            graph.order,
            graph.slot_starts,
            outputs,
            inputs,
            SHARE=share,
            SORTED=True,
            GATED=gated,
            EXACT=exact,
            BM=16,
            **cut,
        )

    rows.embed[(count,)](
        given["ids"],
        tenants,
        table("embed"),
        graph.x,
        shape.scalars.embedding,
        hidden,
        BLOCK=wide,
        num_warps=8,
    )
    top_k = router.top_k
    inner = shape.experts.inner
    width = (a.heads + 2 * a.kv_heads) * a.head_dim
    norms = {"none": 0, "head": 1, "whole": 2}[a.qk_norm]
    for layer in range(len(shape.layers)):
        norm(graph.expert_out, top_k if layer else 0, f"{layer}.input_norm")
        linear(graph.normed, graph.qkv, f"{layer}.qkv", width, hidden)
        attention.rotate_and_keep[(count, a.heads + 2 * a.kv_heads)](
            graph.qkv,
            graph.q,
            cache.keys[layer],
            cache.values[layer],
            tenants,
            given["positions"],
            given["places"],
            table("cos"),
            table("sin"),
            table(f"{layer}.q_norm" if norms else "cos"),
            table(f"{layer}.k_norm" if norms else "cos"),
            shape.norm_eps,
            a.clip or 0.0,
            cache.keys[layer].stride(0),
            HEADS=a.heads,
            KV_HEADS=a.kv_heads,
            D=a.head_dim,
            NORM=norms,
            CLIP=a.clip is not None,
            HALF=power_of_two(a.head_dim // 2),
            WHOLE=power_of_two(a.heads * a.head_dim),
            num_warps=1 if norms < 2 else 4,
        )
        attention.attend[(count, a.kv_heads, graph.splits)](
            graph.q,
            cache.keys[layer],
            cache.values[layer],
            given["blocks"],
            given["lengths"],
            graph.parts,
            graph.part_logs,
            a.scale,
            cache.keys[layer].stride(0),
            graph.inputs.width,
            KV_HEADS=a.kv_heads,
            SHARED=a.heads // a.kv_heads,
            D=a.head_dim,
            DP=max(16, power_of_two(a.head_dim)),
            BLOCK=BLOCK,
            SPLITS=graph.splits,
            WINDOW=a.window or 0,
            EXACT=exact,
            RP=max(16, power_of_two(a.heads // a.kv_heads)),
            BK=64,
            num_warps=4,
        )
        attention.merge[(count, a.heads)](
            graph.parts,
            graph.part_logs,
            given["lengths"],
            graph.attended,
            HEADS=a.heads,
            D=a.head_dim,
            DP=power_of_two(a.head_dim),
            SPLITS=graph.splits,
            num_warps=1,
        )
        linear(graph.attended, graph.out, f"{layer}.o", hidden, a.heads * a.head_dim)
        norm(graph.out, 1, f"{layer}.post_norm")
        linear(graph.normed, graph.router, f"{layer}.router", shape.experts.count, hidden)
        routing.pick[(count,)](
            graph.router,
            tenants,
            pool._tables[layer],
            pool._residual_numbers[layer],
            graph.keys,
            graph.gates,
            graph.numbers,
            shape.experts.count,
            TOP=top_k,
            RENORMALISE=router.renormalise or router.softmax == "picked",
            ROUND=router.gates == "hidden",
            TOP_BLOCK=power_of_two(top_k),
            BLOCK=power_of_two(shape.experts.count),
            num_warps=1,
        )
        slots = len(experts[2 * layer])
        routing.sort[(1,)](
            graph.keys,
            graph.numbers,
            graph.order,
            graph.slot_starts,
            count * top_k,
            slots,
            BLOCK=power_of_two(count * top_k),
            SLOTS_BLOCK=power_of_two(slots + 1),
            STEP=8,
            num_warps=8,
        )
        gate_up, down = experts[2 * layer], experts[2 * layer + 1]
        added = graph.residuals
        if added is None:
            products(graph.normed, graph.inner, gate_up, inner, hidden, top_k, True)
            products(graph.inner, graph.expert_out, down, hidden, inner, 1, False)
            continue
        added.cut(graph.numbers, graph.order, graph.slot_starts[slots:])
        products(graph.normed, graph.gate_up, gate_up, 2 * inner, hidden, top_k, False)
        added.add(("gate", "up"), graph.normed, graph.gate_up, top_k)
        rows.activate[(count * top_k, -(-inner // 1024))](
            graph.gate_up, graph.inner, inner, BLOCK=1024, num_warps=4
        )
        products(graph.inner, graph.expert_out, down, hidden, inner, 1, False)
        added.add(("down",), graph.inner, graph.expert_out)
    norm(graph.expert_out, top_k, "norm")
    linear(graph.normed, graph.logits, "head", shape.vocab_size, hidden)
    if shape.scalars.logits_divisor != 1.0:
        graph.logits.div_(shape.scalars.logits_divisor)
    torch.argmax(graph.logits, dim=-1, out=graph.winners)


def tile(outputs: int, sorted_rows: bool, exact: bool) -> dict[str, int]:
    """How a program of `kernels.linear.linear` is cut: outputs and inputs at once, warps, stages.

    Of ten cuts tried on an H100 for the shapes of Mixtral, OLMoE and Qwen3-30B, these were fast for
    all; none was the fastest for all. Float32 takes twice the bytes.
    """
    if exact:
        return {"BN": 16, "BK": 64, "num_warps": 4, "num_stages": 3}
    if sorted_rows:
        return {"BN": 32, "BK": 128, "num_warps": 4, "num_stages": 4}
    if outputs <= 2048:  # few programs: each must have much on its way
        return {"BN": 16, "BK": 512, "num_warps": 4, "num_stages": 3}
    return {"BN": 16, "BK": 128, "num_warps": 2, "num_stages": 6}
