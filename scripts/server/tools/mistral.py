"""Mistral's: behind a special token a list of calls, or calls one after another.

    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]
    [TOOL_CALLS]weather{"city": "Oslo"}
    [TOOL_CALLS]weather[ARGS]{"city": "Oslo"}

Source: mistral-common, tokens/tokenizers/instruct.py: version 3 has the first, version 11 the
others.
"""

from __future__ import annotations

import json
import re

from scripts.server.tools.parser import Call, ToolParser, call_of

_NAME = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*")


class MistralParser(ToolParser):
    begin, end, special = "[TOOL_CALLS]", None, True

    def calls_of(self, block: str) -> list[Call] | None:
        decoder = json.JSONDecoder()
        try:
            if block.lstrip().startswith("["):
                values, _ = decoder.raw_decode(block.lstrip())
                calls = [call_of(value) for value in values]
                return None if None in calls or not calls else [c for c in calls if c is not None]
            found, at = [], 0
            while at < len(block.rstrip()):
                name = _NAME.match(block, at)
                if name is None:
                    return None
                _, end = decoder.raw_decode(block, name.end())
                found.append(Call(name[1], block[name.end() : end]))
                at = end
            return found or None
        except (ValueError, RecursionError, TypeError):
            return None
