"""The router: which experts a token goes to, and with which gates."""

from __future__ import annotations

from torch import Tensor


def route_top_k(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Pick each token's experts, weights renormalised over the picked ones.

    router_logits: [T, E] in any float type. Returns weights float32 [T, K], expert_ids int64 [T,
        K].
    Source: arXiv 2401.04088, section 2.1; transformers softmaxes in float32 over all experts first,
        which is the same.
    """
    values, expert_ids = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    return values / values.sum(dim=-1, keepdim=True), expert_ids
