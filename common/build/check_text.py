"""Before a tenant comes into a store: whether serving can use its tokenizer, chat template and
generation config."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common.checkpoints import Checkpoint
from common.checkpoints.generation_config import FILE, GenerationConfig, decide
from common.errors import CheckpointError, StoreError
from common.serving.tenant_text import TenantText


def decide_generation(name: str, checkpoint: Checkpoint) -> GenerationConfig:
    """Load a checkpoint's small files with the code that serves them, and decide what they say
    about generating.

    Raises CheckpointError that names tenant, file or field, and the mend.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Serving has these files and no others, so the checkpoint's own directory would prove too
        # much.
        for file, asset in checkpoint.assets.items():
            if isinstance(asset, bytes):
                (Path(folder) / file).write_bytes(asset)
            else:
                (Path(folder) / file).symlink_to(asset.resolve())
        text = TenantText(name, Path(folder))
        try:
            text.check()
        except StoreError as error:
            raise CheckpointError(str(error).replace(folder, str(checkpoint.path))) from error
    given, config = checkpoint.assets.get(FILE), checkpoint.assets.get("config.json")
    return decide(
        checkpoint.config,
        given if isinstance(given, Path) else None,
        default_eos=checkpoint.family.default_eos_token_id,
        tokenizer_eos=None if text.tokenizer is None else text.tokenizer.eos_token_id,
        where=str(config if isinstance(config, Path) else checkpoint.path),
    )
