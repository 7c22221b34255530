"""The router: which experts a token goes to, and with which gates.

Its product is in torch_engine/models/decoder.py; decode steps on CUDA do both in
torch_engine/decode/kernels/routing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.families.shape import Router


def route(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each token's experts and weigh them.

    Args:
        logits: [T, E] in the type of the hidden states.
    Returns:
        gates float32 [T, K], rounded as the router says, and expert_ids int64 [T, K].
    """
    wide = logits.float()
    if router.softmax == "picked":
        picked, expert_ids = wide.topk(router.top_k, dim=-1)
        gates = picked.softmax(dim=-1)
    else:
        gates, expert_ids = wide.softmax(dim=-1).topk(router.top_k, dim=-1)
    if router.renormalise:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    if router.gates == "hidden" and logits.dtype != torch.float32:
        gates = gates.to(logits.dtype).float()
    return gates, expert_ids
