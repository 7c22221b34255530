"""Experts of an adapter's tenant: those of its base with the adapter's own numbers beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.build.sources import Source
from common.checkpoints.peft_tensors import AdaptedTensor, LowRank
from common.plan.adapted import AdaptedExpert, pack_factors, with_one_v
from common.plan.residual import Part, join_parts


def adapted_experts(
    source: Source, dtype: str, put: Callable[[np.ndarray], str]
) -> tuple[AdaptedExpert, ...]:
    """Those that the adapter changed by low-rank terms alone, which are smaller than the matrices.

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
            terms = [term for term in ref.terms if isinstance(term, LowRank)]
            made = [_packed(projection, term, dtype) for term in terms]
            size = sum(len(data) for _, data in made)
            if ref.replaced or len(terms) < len(ref.terms) or size >= ref.size_in(dtype):
                break
            parts += [part for part, _ in made]
            packed += [data for _, data in made]
        else:
            if parts:
                parts, packed = with_one_v(parts, packed, dict(spec.projections))
                record = put(join_parts(packed))
                found.append(AdaptedExpert(*place, base, tuple(parts), record))
    return tuple(found)


def _packed(projection: str, term: LowRank, dtype: str) -> tuple[Part, np.ndarray]:
    wide = dtype == term.a.dtype == term.b.dtype == "float32"
    return pack_factors(projection, *term.factors(), term.scaling, 32 if wide else 16)
