"""T5X's parameter tree and the canonical tensors of a Switch Transformer, in both directions.

The tree is flaxformer's (architectures/t5 and architectures/moe), as T5X keeps it under `target`;
the names here are its paths joined by dots, without `target.`. Kernels are [in, out] there and
[out, in] here; the experts of a layer are one array [experts, in, out] there and a tensor each
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from common.checkpoints.checkpoint import Checkpoint, TensorSource
from common.checkpoints.tensorstore_array import ArrayOnDisk, ExpertBlocks, LazyTensor
from common.dtypes import BY_NAME, common_dtype
from common.errors import CheckpointError
from common.families import Dims
from common.families.switch_transformers import as_switch

EMBEDDING = "token_embedder.embedding"


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor lies in T5X's tree: the whole of an array, or one expert of it."""

    name: str
    transposed: bool
    expert: int | None = None

    def array_shape(self, shape: Dims, num_experts: int) -> Dims:
        """Dims of T5X's array, from the canonical tensor's."""
        shape = shape[::-1] if self.transposed else shape
        return shape if self.expert is None else (num_experts, *shape)


ATTENTION = {
    ("encoder", "SelfAttention"): "attention",
    ("decoder", "SelfAttention"): "self_attention",
    ("decoder", "EncDecAttention"): "encoder_decoder_attention",
}
PROJECTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
# By side and by the number of the sublayer, counted as transformers does.
NORM = {
    ("encoder", "0"): "pre_attention_layer_norm",
    ("encoder", "1"): "pre_mlp_layer_norm",
    ("decoder", "0"): "pre_self_attention_layer_norm",
    ("decoder", "1"): "pre_cross_attention_layer_norm",
    ("decoder", "2"): "pre_mlp_layer_norm",
}

_BLOCK = re.compile(
    r"(?P<side>encoder|decoder)\.block\.(?P<layer>\d+)\.layer\.(?P<part>\d)\.(?P<rest>.+)"
)
_ATTENTION = re.compile(r"(\w+)\.([qkvo])\.weight")
_DENSE = re.compile(r"mlp\.(wi|wi_0|wi_1|wo)\.weight")
_EXPERT = re.compile(r"mlp\.experts\.expert_(\d+)\.(wi|wi_0|wi_1|wo)\.weight")
_WHOLE = {
    "shared.weight": Place(EMBEDDING, False),
    # Untied, transformers has a table a side; T5X has one for both.
    "encoder.embed_tokens.weight": Place(EMBEDDING, False),
    "decoder.embed_tokens.weight": Place(EMBEDDING, False),
    "lm_head.weight": Place("decoder.logits_dense.kernel", True),
    "encoder.final_layer_norm.weight": Place("encoder.encoder_norm.scale", False),
    "decoder.final_layer_norm.weight": Place("decoder.decoder_norm.scale", False),
}
_REST = {
    "SelfAttention.relative_attention_bias.weight": ("relpos_bias.rel_embedding", True),
    "mlp.router.classifier.weight": ("mlp.router.router_weights.w.kernel", True),
    "mlp.router.classifier.bias": ("mlp.router.router_weights.w.bias", False),
}


def place_of(canonical: str) -> Place:
    """The place of a canonical tensor of a Switch Transformer; a KeyError for any other name is our
    own mistake."""
    if canonical in _WHOLE:
        return _WHOLE[canonical]
    block = _BLOCK.fullmatch(canonical)
    if block is None:
        raise KeyError(canonical)
    side, rest = block["side"], block["rest"]
    layer = f"{side}.layers_{block['layer']}"
    if rest in _REST:
        name, transposed = _REST[rest]
        # One table of position biases a side, which transformers keeps in its first layer.
        return Place(f"{side if name.startswith('relpos') else layer}.{name}", transposed)
    if rest == "layer_norm.weight":
        return Place(f"{layer}.{NORM[side, block['part']]}.scale", False)
    if match := _ATTENTION.fullmatch(rest):
        return Place(f"{layer}.{ATTENTION[side, match[1]]}.{PROJECTION[match[2]]}.kernel", True)
    if match := _DENSE.fullmatch(rest):
        return Place(f"{layer}.mlp.{match[1]}.kernel", True)
    if match := _EXPERT.fullmatch(rest):
        return Place(f"{layer}.mlp.expert.{match[2]}.kernel", True, int(match[1]))
    raise KeyError(canonical)


def locate(
    shapes: Mapping[str, Dims], num_experts: int, arrays: Mapping[str, ArrayOnDisk]
) -> dict[str, LazyTensor]:
    """Every canonical tensor (`shapes`) among T5X's arrays, by their names in the tree.

    Raises CheckpointError for an array that is missing, superfluous, or of another shape or order
    of axes.
    """
    blocks = ExpertBlocks()
    tensors = {}
    used = set()
    for canonical, shape in shapes.items():
        place = place_of(canonical)
        array = arrays.get(place.name)
        if array is None:
            near = next(iter(arrays.values()))
            raise CheckpointError(
                f"{near.path.parent}: array target.{place.name} is missing; the checkpoint is "
                "incomplete"
            )
        expected = place.array_shape(shape, num_experts)
        if array.shape != expected:
            other_order = sorted(array.shape) == sorted(expected)
            raise CheckpointError(
                f"{array.path}: array {array.name} is {list(array.shape)}, the other arrays imply "
                f"{list(expected)}; "
                + (
                    "its axes are in another order than T5X's ([experts, in, out] and [in, out])"
                    if other_order
                    else "the arrays belong to different models, or this one is damaged"
                )
            )
        tensors[canonical] = LazyTensor(array, shape, place.transposed, place.expert, blocks)
        used.add(place.name)
    unused = sorted(set(arrays) - used)
    if unused:
        extra = arrays[unused[0]]
        raise CheckpointError(
            f"{extra.path}: array {extra.name} is none of a Switch Transformer's"
            + (f", nor are {len(unused) - 1} more" if len(unused) > 1 else "")
            + "; Moetel reads flaxformer's Switch without scanned layers"
        )
    return tensors


def array_names(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """T5X's arrays, sorted, each with the canonical tensors that it is made of.

    Raises CheckpointError for a family that T5X has no layout for.
    """
    if checkpoint.family.name != "switch_transformers":
        raise CheckpointError(
            f"{checkpoint.path}: holds a {checkpoint.family.name} model; "
            "only Switch Transformers have a layout in T5X, keep this one in Hugging Face's"
        )
    if as_switch(checkpoint.config).untied:
        raise CheckpointError(
            f"{checkpoint.path}: {', '.join(as_switch(checkpoint.config).untied)} differ from the "
            "shared table that "
            "config.json ties them to; T5X has no layout for that, keep this model in Hugging "
            "Face's"
        )
    found: dict[str, list[str]] = {}
    for canonical in checkpoint.tensors:
        found.setdefault(place_of(canonical).name, []).append(canonical)
    return dict(sorted(found.items()))


def array_dtype(sources: Iterable[TensorSource], dtype: str) -> str:
    """Type to write an array in: `dtype`, or for "auto" its own; T5X has no float16, which becomes
    float32."""
    if dtype != "auto":
        return dtype
    own = common_dtype([s.dtype for s in sources])
    return "float32" if own == "float16" else own


def stream_arrays(
    checkpoint: Checkpoint, dtype: str = "auto"
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name in T5X's tree, number of canonical tensors in it, array), sorted by name; one array in
    memory at a time.

    dtype: "auto", "float32" or "bfloat16". Raises CheckpointError where T5X's tree cannot hold the
        model.
    """
    for name, canonicals in array_names(checkpoint).items():
        sources = [checkpoint.tensors[c] for c in canonicals]
        target = BY_NAME[array_dtype(sources, dtype)]
        places = [place_of(c) for c in canonicals]
        if places[0].expert is None:
            array = sources[0].read()
            for canonical, source in zip(canonicals[1:], sources[1:], strict=True):
                if not np.array_equal(array, source.read()):
                    raise CheckpointError(
                        f"{source.path}: tensor {canonical} differs from {canonicals[0]}; "
                        "T5X has one embedding table for both, so this model cannot be written in "
                        "its layout"
                    )
            array = np.ascontiguousarray(array.T if places[0].transposed else array).astype(
                target, copy=False
            )
        else:
            array = np.empty(places[0].array_shape(sources[0].shape, len(sources)), dtype=target)
            for place, source in zip(places, sources, strict=True):
                array[place.expert] = source.read().T
        yield name, len(canonicals), array
        del array
