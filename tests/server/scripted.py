"""Tenants whose chat template a test writes, and answers that a test writes too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from common import SamplingParams, build_store
from tests import helpers
from tests.byte_tokenizer import byte_tokenizer
from tests.server.live import Live

MARKS = ("<think>", "</think>")
END_ID = 263  # of the second mark, where a tenant has both


def tenants_of(root: Path, templates: Mapping[str, str | None], marked: Sequence[str] = ()) -> Path:
    """A store of random tenants with a token a byte. templates: of each tenant; None: the usual
    one. marked: tenants that have `MARKS` as tokens."""
    base = helpers.random_mixtral(0, vocab_size=280, max_position_embeddings=2048, eos_token_id=2)
    paths = {}
    for seed, (name, template) in enumerate(templates.items()):
        paths[name] = helpers.save(helpers.tuned(base, seed), root / name)
        tokenizer = byte_tokenizer(["<user>", "<bot>"])
        if name in marked:
            tokenizer.add_tokens(list(MARKS))
            assert tokenizer.convert_tokens_to_ids(MARKS[1]) == END_ID
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(paths[name])
    return build_store(root / "store", paths, policy="round_robin").path


def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def saying(text: str, **fields: Any) -> dict[str, Any]:
    """Fields that let a random model say a text. Lark's notation names tokens by their marks."""
    parts = [part for part in re.split("(</?think>)", text) if part]
    rule = " ".join(p if p in MARKS else json.dumps(p) for p in parts)
    return {"structured_outputs": {"grammar": f"start: {rule}"}, **fields}


def hold_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let structures hold for reasoning too, so that `saying` says it."""
    monkeypatch.setattr(SamplingParams, "structured_behind", lambda self, mark: self)
