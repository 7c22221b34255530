"""Experts of an adapter's tenant: those of its base with the adapter's own numbers beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.build.sources import Source
from common.checkpoints.peft_tensors import AdaptedTensor, LowRank
from common.plan.adapted import AdaptedExpert, pack_factors
from common.plan.residual import Part, join_parts


def adapted_experts(
    source: Source, dtype: str, put: Callable[[np.ndarray], str]
) -> tuple[AdaptedExpert, ...]:
    """Those that the adapter changed by low-rank terms alone.

    dtype: the store's type. Factors are kept in 32 bits if they and the store have 32, else in 16:
    then either they have no more digits, or the base's weights have fewer. put: stores a record.
    """
    family, spec = source.family, source.config.experts
    found = []
    for position in range(spec.num_positions):
        place = divmod(position, spec.num_experts)
        names = {p: family.expert_tensor(source.config, *place, p) for p, _ in spec.projections}
        base = {p: source.base_ids.get(n, source.ids[n]) for p, n in names.items()}
        parts: list[Part] = []
        packed: list[np.ndarray] = []
        for projection, name in names.items():
            ref = source.refs[name]
            if not isinstance(ref, AdaptedTensor) or base[projection] == source.ids[name]:
                continue
            if ref.replaced or not all(isinstance(term, LowRank) for term in ref.terms):
                break
            for term in ref.terms:
                assert isinstance(term, LowRank)
                wide = dtype == term.a.dtype == term.b.dtype == "float32"
                part, data = pack_factors(
                    projection, *term.factors(), term.scaling, 32 if wide else 16
                )
                parts.append(part)
                packed.append(data)
        else:
            if parts:
                record = put(join_parts(packed))
                found.append(AdaptedExpert(*place, base, tuple(parts), record))
    return tuple(found)
