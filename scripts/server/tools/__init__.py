"""Calls of tools in answers: one parser a format, by vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.server.tools.hermes import HermesParser
from scripts.server.tools.mistral import MistralParser
from scripts.server.tools.parser import Call, Parsed, ToolParser
from scripts.server.tools.qwen3_coder import Qwen3CoderParser

PARSERS: Mapping[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "mistral": MistralParser,
    "qwen3_coder": Qwen3CoderParser,
}


def new_parser(name: str, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
    """For one answer. tools: as the request has them."""
    return PARSERS[name](tools)


__all__ = ["PARSERS", "Call", "Parsed", "ToolParser", "new_parser"]
