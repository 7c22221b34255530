"""Nous Research's Hermes, and Qwen2.5 and Qwen3: a JSON object a call.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Source: the model card of NousResearch/Hermes-2-Pro-Llama-3-8B, "Prompt Format for Function
Calling".
"""

from __future__ import annotations

import json

from scripts.server.tools.parser import Call, ToolParser, call_of


class HermesParser(ToolParser):
    begin, end = "<tool_call>", "</tool_call>"

    def calls_of(self, block: str) -> list[Call] | None:
        try:
            call = call_of(json.loads(block))
        except (ValueError, RecursionError):
            return None
        return None if call is None else [call]
