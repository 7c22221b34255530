"""Pictures of a store: distances as a heat map, and the plan as a map of whose copy sits where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common import EngineError, Store
from common.plan.plan import MERGED

# Okabe and Ito's colours, which colour-blind readers can tell apart; more tenants go on with a
# wider palette.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


MERGED_COLOUR = "#BBBBBB"


def draw_store(store: Store, path: Path) -> None:
    """Draw layers x experts: left the mean distance over all pairs, right the copies' owners
    (stripes if several)."""
    try:
        import matplotlib
    except ImportError as error:
        raise EngineError("--plot needs matplotlib; run: pip install 'moetel[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch, Rectangle

    layers, experts = store.experts.num_layers, store.experts.num_experts
    cell = min(0.5, 24 / max(layers, experts))
    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(max(5.0, 2 * experts * cell + 4.5), max(3.2, layers * cell + 1.8)),
        layout="constrained",
    )
    pairs = max(1, len(store.distances.pairs))  # a store of one tenant has none
    image = left.imshow(store.distances.score() / pairs, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=left, label="L2 distance, mean over pairs")
    left.set_title("distance between tenants")

    colours = [
        COLOURS[i] if i < len(COLOURS) else pyplot.cm.tab20(i % 20)
        for i in range(len(store.tenants))
    ]
    owners: dict[tuple[int, int], list[int]] = {}
    for copy in store.plan.copies:
        owners.setdefault((copy.layer, copy.expert), []).append(copy.owner)
    any_missing = any_merged = False
    for layer in range(layers):
        for expert in range(experts):
            here = owners.get((layer, expert), [])
            x, y = expert - 0.5, layer - 0.5
            if not here:
                any_missing = True
                right.add_patch(
                    Rectangle(
                        (x, y),
                        1,
                        1,
                        facecolor="white",
                        edgecolor="#999999",
                        hatch="///",
                        linewidth=0,
                    )
                )
            for i, owner in enumerate(here):
                width = 1 / len(here)
                any_merged |= owner == MERGED
                colour = MERGED_COLOUR if owner == MERGED else colours[owner]
                right.add_patch(
                    Rectangle((x + i * width, y), width, 1, facecolor=colour, linewidth=0)
                )
            right.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="white", linewidth=1))
    right.set_xlim(-0.5, experts - 0.5)
    right.set_ylim(layers - 0.5, -0.5)
    right.set_title(f"plan: whose copy is resident ({store.plan.num_slots} copies)")
    handles = [
        Patch(facecolor=colour, label=name)
        for colour, name in zip(colours, store.tenants, strict=True)
    ]
    if any_merged:
        handles.append(Patch(facecolor=MERGED_COLOUR, label="merged"))
    if any_missing:
        handles.append(
            Patch(facecolor="white", edgecolor="#999999", hatch="///", label="not resident")
        )
    right.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for axes in (left, right):
        _label(axes, layers, experts)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{path}: the picture cannot be written ({error}); give a file name that ends in .png, "
            "in a directory that "
            "is there"
        ) from error
    finally:
        pyplot.close(figure)


def _label(axes: Any, layers: int, experts: int) -> None:
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(np.arange(0, experts, max(1, experts // 16)))
    axes.set_yticks(np.arange(0, layers, max(1, layers // 32)))
