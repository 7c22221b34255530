"""What a checkpoint says about generating: which tokens end an answer, where answers start, and how
to sample.

Three files may say it: generation_config.json, config.json and the tokenizer's. It is decided once,
when a tenant is built into a store, and kept there; serving, export and statistics read what was
decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.checkpoints.weight_files import read_json
from common.errors import CheckpointError, RequestError
from common.families import ModelConfig
from common.sampling_params import SamplingParams

FILE = "generation_config.json"

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""Settings that become the server's defaults, as in vLLM (vllm/config/model.py,
`get_diff_sampling_param`)."""

# Settings of transformers' GenerationConfig that change answers, with the values at which they do
# nothing. None and an empty list always do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_length": (),
    "max_time": (),
    "stop_strings": (),
    "typical_p": (1, 1.0),
    "top_h": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "renormalize_logits": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_decoder_ids": (),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "diversity_penalty": (0, 0.0),
    "remove_invalid_values": (False,),
}


@dataclass(frozen=True)
class GenerationConfig:
    """What was decided for a tenant.

    eos_token_ids: all that end an answer: of generation_config.json, config.json and the tokenizer,
        in this order.
    decoder_start_token_id: what answers of an encoder-decoder are decoded from.
    forced_bos_token_id, forced_eos_token_id: an answer's first token, and its last one where it
        reaches its limit.
    sampling: defaults of the server, by name of `SamplingParams`.
    unused: settings of generation_config.json that change transformers' answers and are not
        applied.
    """

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    sampling: Mapping[str, int | float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def token_ids(self) -> dict[str, Any]:
        """The special tokens as generation_config.json writes them, those that are not set left
        out."""
        eos = list(self.eos_token_ids)
        ids = {
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
            "forced_bos_token_id": self.forced_bos_token_id,
            "forced_eos_token_id": self.forced_eos_token_id,
        }
        return {name: value for name, value in ids.items() if value is not None}

    def notes(self) -> tuple[str, ...]:
        """What people should know about it."""
        if not self.unused:
            return ()
        return (
            f"{FILE}: not applied: {', '.join(self.unused)}; answers differ from transformers' "
            "generate()",
        )

    def to_json(self) -> dict[str, Any]:
        return self.token_ids | {
            "eos_token_id": list(self.eos_token_ids),
            "sampling": dict(self.sampling),
            "unused": list(self.unused),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GenerationConfig:
        ids = {k: v for k, v in value.items() if k not in ("eos_token_id", "sampling", "unused")}
        return cls(
            tuple(value["eos_token_id"]),
            **ids,
            sampling=value["sampling"],
            unused=tuple(value["unused"]),
        )


def decide(
    config: ModelConfig,
    path: Path | None,
    *,
    default_eos: int | None,
    tokenizer_eos: int | None = None,
    where: str = "config.json",
) -> GenerationConfig:
    """Decide from a tenant's files.

    path: its generation_config.json, None if it has none. default_eos: what a config.json without
        the field means.
    tokenizer_eos: the tokenizer's end-of-sequence token. where: config.json, for errors.
    Raises CheckpointError that names file and field.
    """
    given = {} if path is None else read_json(path)
    file = str(path)
    raw, size = config.raw, config.vocab_size
    ends = [
        *_ids(given.get("eos_token_id"), "eos_token_id", size, file),
        *_ids(raw.get("eos_token_id"), "eos_token_id", size, where),
    ]
    # A tokenizer may know more tokens than the model, whose head then never gives them.
    if tokenizer_eos is not None and tokenizer_eos < size:
        ends.append(tokenizer_eos)
    if not ends and default_eos is not None and "eos_token_id" not in raw and default_eos < size:
        ends.append(default_eos)

    def one(name: str) -> int | None:
        for source, place in ((given, file), (raw, where)):
            if source.get(name) is not None:
                found = _ids(source[name], name, size, place)
                if isinstance(source[name], list) and name != "forced_eos_token_id":
                    raise _error(place, name, source[name], size)
                return found[0]
        return None

    start = None
    if config.is_encoder_decoder:
        start = one("decoder_start_token_id")
        start = getattr(config.shape, "decoder_start_token_id", None) if start is None else start
    return GenerationConfig(
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=_known(given, raw, "pad_token_id", size),
        bos_token_id=_known(given, raw, "bos_token_id", size),
        decoder_start_token_id=start,
        forced_bos_token_id=one("forced_bos_token_id"),
        forced_eos_token_id=one("forced_eos_token_id"),
        sampling=_sampling(given, file),
        unused=_unused(given),
    )


def _error(where: str, field: str, value: Any, size: int) -> CheckpointError:
    many = ", or a list of them" if field == "eos_token_id" else ""
    return CheckpointError(
        f"{where}: field {field!r} is {value!r}; expected a token id from 0 to {size - 1}{many}"
    )


def _ids(value: Any, field: str, size: int, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise _error(where, field, value, size)
    return list(ids)


def _known(given: Mapping[str, Any], raw: Mapping[str, Any], field: str, size: int) -> int | None:
    """A token that nothing here computes with: what is no id is passed over."""
    return next(
        (v for v in (given.get(field), raw.get(field)) if type(v) is int and 0 <= v < size), None
    )


def _sampling(given: Mapping[str, Any], where: str) -> dict[str, int | float]:
    found = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    for name, value in found.items():
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            raise CheckpointError(
                f"{where}: {error}; mend the file, or leave the field out"
            ) from error
    return found


def _unused(given: Mapping[str, Any]) -> tuple[str, ...]:
    def applies(name: str, value: Any) -> bool:
        return value not in (None, [], {}) and value not in _NEUTRAL[name]

    return tuple(name for name in _NEUTRAL if name in given and applies(name, given[name]))
