"""Fields of OpenAI's and vLLM's requests that are not supported here: which are refused, and which
mean nothing.

What is supported is declared in `requests.py`. Every field of their schemas is in one of the three;
a test keeps it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NOTHING: tuple[Any, ...] = (False, "", [], {})


@dataclass(frozen=True)
class Refused:
    """A field that would change the answer. why: what is missing here, for the error.

    neutral: values that change nothing, beside null; those pass.
    """

    why: str
    neutral: tuple[Any, ...] = _NOTHING

    def applies(self, value: Any) -> bool:
        return value is not None and not any(_same(value, each) for each in self.neutral)


def _same(a: Any, b: Any) -> bool:
    """Equal, and both or neither of them a truth value: 0 is not false."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


_CONSTRAINED = Refused("use structured_outputs")
_TOOLS = Refused("use tools")
_MEDIA = Refused("tenants read text alone")
_TRANSFER = Refused("caches are not handed to other servers")
_OWN_TEMPLATE = Refused("the tenant's own template is used")
_OTHER_ROUTE = Refused("this is for /v1/completions")
_CHAT_ROUTE = Refused("this is for /v1/chat/completions")

REFUSED: Mapping[str, Refused] = {
    "use_beam_search": Refused("beam search is not offered"),
    "length_penalty": Refused("it belongs to beam search, which is not offered", (1, 1.0)),
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "guided_decoding_backend": _CONSTRAINED,
    "guided_whitespace_pattern": _CONSTRAINED,
    "structural_tag": _CONSTRAINED,
    "logits_processors": Refused("code of requests is not run"),
    "bad_words": Refused("use logit_bias"),
    "allowed_token_ids": Refused("use logit_bias", ()),
    "logprob_token_ids": Refused("only those of the most probable tokens are offered", ()),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "spaces_between_special_tokens": Refused(
        "there are none beside those that the tokenizer writes", (True,)
    ),
    "repetition_detection": Refused(
        "answers are not watched for repetitions; use repetition_penalty"
    ),
    "thinking_token_budget": Refused("thinking is not told apart from the answer", (-1,)),
    "watermarking": Refused("answers are not marked"),
    "stream_interval": Refused("each token has a chunk of its own", (1,)),
    "kv_transfer_params": _TRANSFER,
    "ec_transfer_params": _TRANSFER,
    "vllm_xargs": Refused("there are no extensions that would read it"),
}
"""Of completions and of chat."""

REFUSED_COMPLETION: Mapping[str, Refused] = {
    **REFUSED,
    "suffix": Refused("the models only go on from a prompt"),
    "messages": _CHAT_ROUTE,
    "max_completion_tokens": _CHAT_ROUTE,
    "top_logprobs": Refused(_CHAT_ROUTE.why, (0,)),
    "add_generation_prompt": Refused(_CHAT_ROUTE.why, (True,)),
    "continue_final_message": _CHAT_ROUTE,
    "documents": _CHAT_ROUTE,
    "chat_template": _CHAT_ROUTE,
    "chat_template_kwargs": _CHAT_ROUTE,
    "reasoning_effort": _CHAT_ROUTE,
    "return_prompt_text": _CHAT_ROUTE,
    "functions": _TOOLS,
}

REFUSED_TEMPLATE: Mapping[str, Refused] = {
    "chat_template": _OWN_TEMPLATE,
    "mm_processor_kwargs": _MEDIA,
    "media_io_kwargs": _MEDIA,
}
"""Of conversations, also at /tokenize."""

REFUSED_CHAT: Mapping[str, Refused] = {
    **REFUSED,
    **REFUSED_TEMPLATE,
    "functions": _TOOLS,
    "function_call": Refused("use tool_choice", ("none", "auto")),
    "audio": Refused("audio is not offered"),
    "modalities": Refused("answers are text", ([], ["text"])),
    "moderation": Refused("nothing is moderated", ()),
    "verbosity": Refused("the models do not know it; say it in a message", ("medium",)),
    "web_search_options": Refused("the web is not searched", ()),
    "echo": _OTHER_ROUTE,
    "prompt": _OTHER_ROUTE,
    "suffix": _OTHER_ROUTE,
}

REFUSED_STREAM: Mapping[str, Refused] = {
    "continuous_usage_stats": Refused(
        "usage comes once, at the end of the stream; use include_usage"
    ),
}
"""Of stream_options."""

MEANINGLESS: Mapping[str, str] = {
    "user": "requests are counted by key",
    "session_id": "requests are not grouped",
    "prompt_cache_key": "beginnings of prompts are found without it; cache_salt keeps them apart",
    "prompt_cache_options": "beginnings of prompts are kept as long as there is room",
    "prompt_cache_retention": "beginnings of prompts are kept as long as there is room",
    "metadata": "answers are not kept",
    "store": "answers are not kept",
    "service_tier": "there is one",
    "safety_identifier": "nobody is told of it",
    "prediction": "it may save time, and changes no answer",
    "routed_experts_prompt_start": "answers do not tell the experts of each token",
    "return_token_offsets": "it is for routes that only write prompts out",
    "return_mm_kwargs": "it is for routes that only write prompts out",
    "include_obfuscation": "chunks are not padded",
}
"""Fields that change no answer here, and why; any value passes."""
