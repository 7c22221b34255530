"""PEFT adapters: a base checkpoint with what adapter_model.safetensors adds to it.

Nothing is merged before it is read, and what an adapter leaves alone stays the base's own.
Source: peft 0.21, utils/save_and_load.py, tuners/lora, and `_inject_parameters` of
tuners/tuners_utils.py, which says
how adapters of several parameters of one module are nested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from common.checkpoints.checkpoint import Checkpoint, TensorSource
from common.checkpoints.hugging_face import ASSETS
from common.checkpoints.peft_base import find_base
from common.checkpoints.peft_config import MERGE, AdapterConfig
from common.checkpoints.peft_tensors import (
    B_BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    A,
    AdaptedTensor,
    B,
    Bias,
    LowRank,
)
from common.checkpoints.safetensors_file import TensorRef, read_header, refuse_pointer
from common.checkpoints.weight_files import ADAPTER, has_weights, read_json
from common.errors import CheckpointError
from common.families import Dims, ModelConfig, Region

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_PART = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.weight)?"
)
_PREFIX = "base_model.model."
# Files without which a tokenizer is none. A tokenizer's files are taken from one place.
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"}

Places = Mapping[str, list[tuple[str, Region]]]


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, and no whole model."""
    return (path / ADAPTER).is_file() and not has_weights(path)


def open_adapter(
    path: Path,
    base: Path | None,
    beside: tuple[Path, ...],
    open_base: Callable[[Path], Checkpoint],
) -> Checkpoint:
    """Open an adapter's directory and check every tensor's name and shape against its base.

    base: where the base lies, if the user said it. beside: other checkpoints of the same command.
    Reads headers alone. Raises CheckpointError that names file, field or tensor, and the mend.
    """
    config = AdapterConfig.read(path / ADAPTER)
    file = path / WEIGHTS
    if not file.is_file() and (path / PICKLE).is_file():
        raise CheckpointError(
            f"{path / PICKLE}: is a pickle, which can run code and is never read; save the adapter "
            "as safetensors (load it with PEFT where you trust it, then save_pretrained)"
        )
    tensors = read_header(file)
    for ref in tensors.values():
        ref.check_type()
    found = open_base(find_base(config, base, beside))
    return _Adapter(path, config, found, tensors).checkpoint()


def base_of(path: Path) -> Path:
    """Where the base of an adapter at `path` lies. Raises CheckpointError."""
    return find_base(AdapterConfig.read(path / ADAPTER), None, ())


class _Adapter:
    """An adapter's tensors on their way to the places that they are for."""

    def __init__(
        self, path: Path, config: AdapterConfig, base: Checkpoint, tensors: Mapping[str, TensorRef]
    ):
        self.path, self.file = path, path / WEIGHTS
        self.config, self.base, self.tensors = config, base, tensors
        self.places: Places = base.family.places(base.config)
        self.parameters: dict[str, list[str]] = {}
        """Module -> its tensors of files, in the order that the model has them."""
        for name in self.places:
            self.parameters.setdefault(name.rpartition(".")[0], []).append(name)
        self.starts: dict[str, TensorRef] = {}
        self.terms: dict[str, list[LowRank | Bias]] = {}

    def checkpoint(self) -> Checkpoint:
        modules, whole = self._sorted()
        for name, ref in whole.items():
            self._replace(name, ref)
        self._check_saved()
        for module, parts in modules.items():
            self._add(module, parts)
        config, notes = self._config(whole)
        tensors: dict[str, TensorSource] = dict(self.base.tensors)
        for name in {**self.starts, **self.terms}:
            before = self.base.tensors[name]
            tensors[name] = AdaptedTensor(
                self.starts.get(name, before),
                before.dtype,
                tuple(self.terms.get(name, ())),
                name in self.starts,
            )
        return Checkpoint(
            self.path,
            self.base.family,
            config,
            tensors,
            self._assets(),
            (*self.base.notes, *self.config.notes, *notes),
            self.base,
        )

    def _sorted(self) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
        """Adapted modules -> part -> tensor, and tensors that take the place of the base's, by
        their name in files."""
        modules: dict[str, dict[str, TensorRef]] = {}
        whole: dict[str, TensorRef] = {}
        for key, ref in self.tensors.items():
            name = self.base.family.file_name_of(key.removeprefix(_PREFIX))
            found = _PART.fullmatch(name)
            if found is None:
                whole[re.sub(r"\.(modules_to_save|base_layer)\b", "", name)] = ref
            elif found[2] == MAGNITUDE:
                raise CheckpointError(
                    f"{self.file}: tensor {key} is DoRA's, which is not supported; {MERGE}"
                )
            else:
                modules.setdefault(found[1], {})[found[2]] = ref
        return modules, whole

    # Tensors in the place of the base's.

    def _replace(self, name: str, ref: TensorRef) -> None:
        if name not in self.places and ".lora_" in name:
            raise CheckpointError(
                f"{self.file}: tensor {ref.file_tensor} is not named as PEFT saves adapters (an "
                "adapter's name may be in it); load the adapter with PEFT and save_pretrained it"
            )
        if name not in self.places:
            raise CheckpointError(
                f"{self.file}: tensor {ref.file_tensor} is for no tensor of a "
                f"{self.base.family.title} like {self.base.path}; is it the base that the adapter "
                "was trained on? Give that one as the base"
            )
        for canonical, region in self.places[name]:
            if ref.shape != region.whole:
                raise CheckpointError(
                    f"{self.file}: tensor {ref.file_tensor} is {list(ref.shape)}, the base "
                    f"{self.base.path} has {list(region.whole)}; give the base that the adapter "
                    "was trained on, with its embeddings resized if the vocabulary grew"
                )
            self.starts[canonical] = ref.at(region)

    def _check_saved(self) -> None:
        """Raises CheckpointError for a module that the model has, and the file should have."""
        for module in self.config.modules_to_save:
            named = re.compile(rf"(.*\.)?({module})\.")
            parts = {c for name in self.places if named.match(name) for c, _ in self.places[name]}
            if parts and not parts & self.starts.keys():
                raise CheckpointError(
                    f"{self.config.path}: field 'modules_to_save' names {module!r}, of which "
                    f"{WEIGHTS} holds no tensor; save the adapter again, or take the name out"
                )

    # Tensors that are added.

    def _add(self, module: str, parts: Mapping[str, TensorRef]) -> None:
        first = next(iter(parts.values())).file_tensor
        key, name = self._target(module, first)
        embedding = EMBEDDING_A in parts or EMBEDDING_B in parts
        wanted = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
        missing = [part for part in wanted if part not in parts]
        if missing or len(parts) > 2 + (B_BIAS in parts):
            raise CheckpointError(
                f"{self.file}: tensor {first} has no {' and '.join(missing) or 'place'} of its "
                "own beside it; the file is incomplete, save the adapter again"
            )
        a, b = (parts[part] for part in wanted)
        rank, field = self.config.rank_of(key)
        scaling = self.config.scaling_of(key)
        places = self.places[name]
        experts = places[0][1].whole[0] if len(places[0][1].whole) == 3 else 1
        self._check_shapes(name, places[0][1].whole, a, b, rank, field, embedding)
        for canonical, region in places:
            term = LowRank(
                a, b, rank, scaling, experts, region.index, region.rows, embedding=embedding
            )
            self.terms.setdefault(canonical, []).append(term)
        if B_BIAS in parts:
            self._add_bias(name, parts[B_BIAS], scaling)

    def _add_bias(self, name: str, ref: TensorRef, scaling: float) -> None:
        places = self.places.get(name.removesuffix(".weight") + ".bias")
        if places is None:
            raise CheckpointError(
                f"{self.config.path}: field 'lora_bias' is true, and tensor {ref.file_tensor} is "
                f"for a bias that {self.base.path} does not have, so nothing can hold it; train "
                "the adapter without lora_bias"
            )
        canonical, region = places[0]
        if ref.shape != region.whole:
            raise self._other_base(ref, list(region.whole), name)
        self.terms.setdefault(canonical, []).append(Bias(ref, scaling))

    def _target(self, module: str, tensor: str) -> tuple[str, str]:
        """What patterns of adapter_config.json are compared with, and the tensor of files that a
        module's adapter is for. `base_layer` stands for one step into nested adapters."""
        plain = re.sub(r"(\.base_layer)+$", "", module)
        depth = module.count(".base_layer")
        weight = f"{plain}.weight"
        if depth == 0 and weight in self.places:
            if self.config.has_module(plain):
                return plain, weight
            if self.config.has_parameter(weight):
                return weight, weight
        of_module = self.parameters.get(plain, [])
        # The first of a module's parameters is wrapped first, and so lies innermost.
        wrapped = [name for name in of_module if self.config.has_parameter(name)][::-1]
        if depth < len(wrapped):
            return wrapped[depth], wrapped[depth]
        if not of_module:
            raise CheckpointError(
                f"{self.file}: tensor {tensor} is for a module {plain} that a "
                f"{self.base.family.title} like {self.base.path} does not have; is it the base "
                "that the adapter was trained on? Give that one as the base"
            )
        raise CheckpointError(
            f"{self.file}: tensor {tensor} is for {plain}, which neither 'target_modules' nor "
            f"'target_parameters' of {self.config.path.name} names; PEFT would leave it out, give "
            "the file that belongs to these tensors"
        )

    def _check_shapes(
        self,
        name: str,
        whole: Dims,
        a: TensorRef,
        b: TensorRef,
        rank: int,
        field: str,
        embedding: bool,
    ) -> None:
        if len(whole) < 2:
            raise CheckpointError(
                f"{self.file}: tensor {a.file_tensor} adapts {name}, which is no matrix; {MERGE}"
            )
        *stack, out, inputs = whole
        if embedding:
            out, inputs = inputs, out
        total = rank * (stack[0] if stack else 1)
        for ref, wide, at in ((a, inputs, 1), (b, out, 0)):
            if len(ref.shape) != 2 or ref.shape[at] != wide:
                expected = [total, inputs] if at else [out, total]
                raise self._other_base(ref, expected, name)
            if ref.shape[1 - at] != total:
                raise CheckpointError(
                    f"{self.file}: tensor {ref.file_tensor} is {list(ref.shape)}, but field "
                    f"{field!r} of {self.config.path.name} says rank {rank}, which makes "
                    f"{[total, inputs] if at else [out, total]}; give the adapter_config.json "
                    "that belongs to these tensors"
                )

    def _other_base(self, ref: TensorRef, expected: list[int], name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: tensor {ref.file_tensor} is {list(ref.shape)}, but {name} of the base "
            f"{self.base.path} needs {expected}; give the base that the adapter was trained on"
        )

    # The rest of a checkpoint.

    def _config(self, whole: Mapping[str, TensorRef]) -> tuple[ModelConfig, tuple[str, ...]]:
        """The base's config, and without ties of tables that the adapter tells apart."""
        family, config = self.base.family, self.base.config
        tied = family.tied_tables(config)
        adapted = [name for name in tied if name in self.terms]
        if adapted:
            raise CheckpointError(
                f"{self.file}: adapts {adapted[0]}, which the base {self.base.path} ties to "
                f"{next(n for n in tied if n != adapted[0])} (tie_word_embeddings), and PEFT's own "
                "answers then depend on whether it is merged; give a base that does not tie them"
            )
        replaced = [name for name in tied if name in whole]
        if not replaced:
            return config, ()
        if self.config.tied:
            raise CheckpointError(
                f"{self.config.path}: field 'ensure_weight_tying' is true, and the base "
                f"{self.base.path} ties {replaced[0]}, which is not supported; {MERGE}"
            )
        raw = family.untied(config, list(tied[1:]))
        note = f"{replaced[0]} is the adapter's own, and no longer tied to other tables"
        return family.parse_config(raw, str(self.base.path / "config.json")), (note,)

    def _assets(self) -> dict[str, Path | bytes]:
        """The base's small files; the adapter's in their place, a tokenizer's as a whole."""
        mine: dict[str, Path | bytes] = {}
        for name in ASSETS:
            if name != "config.json" and (self.path / name).is_file():
                refuse_pointer(self.path / name)
                mine[name] = self.path / name
        if "generation_config.json" in mine:
            read_json(self.path / "generation_config.json")
        found = dict(self.base.assets)
        if _VOCABULARIES & set(mine):
            kept = ("config.json", "generation_config.json")
            found = {name: asset for name, asset in found.items() if name in kept}
        return found | mine
