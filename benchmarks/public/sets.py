"""Fine-tunes on the Hugging Face hub that share a base, and how they get here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


@dataclass(frozen=True)
class PublicSet:
    """tenants: name -> repository on the hub; the first one is what the others were tuned from.

    gigabytes: what a download takes, roughly.
    """

    tenants: Mapping[str, str]
    gigabytes: int

    @property
    def base(self) -> str:
        return next(iter(self.tenants))


SETS = {
    "olmoe": PublicSet(
        {
            "base": "allenai/OLMoE-1B-7B-0924",
            "sft": "allenai/OLMoE-1B-7B-0924-SFT",
            "instruct": "allenai/OLMoE-1B-7B-0924-Instruct",
        },
        42,
    ),
    # The models of the paper's table (arXiv 2505.06481).
    "mixtral": PublicSet(
        {
            "base": "mistralai/Mixtral-8x7B-v0.1",
            "instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
        },
        187,
    ),
    "qwen3": PublicSet(
        {
            "base": "Qwen/Qwen3-30B-A3B-Base",
            "instruct": "Qwen/Qwen3-30B-A3B-Instruct-2507",
            "thinking": "Qwen/Qwen3-30B-A3B-Thinking-2507",
        },
        183,
    ),
}


def fetch(found: PublicSet, folder: Path, local: Mapping[str, Path]) -> dict[str, Path]:
    """Checkpoints by tenant: those of `local`, and the others from the hub into `folder`.

    What is there already is not fetched again.
    """
    paths = {}
    for name, repository in found.tenants.items():
        if name in local:
            paths[name] = local[name]
        else:
            paths[name] = folder / name
            snapshot_download(repository, allow_patterns=list(FILES), local_dir=paths[name])
    return paths
