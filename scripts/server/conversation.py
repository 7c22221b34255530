"""Conversations as chat templates read them, and prompts as token ids."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from common.errors import MoetelError, RequestError
from common.serving.detokenizer import REPLACEMENT
from common.serving.engine import Engine
from scripts.server.chat_requests import Conversation, Message, Part
from scripts.server.errors import ApiError

log = logging.getLogger(__name__)

PROBE = "moetel probes"
"""A text that no template holds."""

# Names that transformers' apply_chat_template, or this server, gives a meaning of its own.
RESERVED = frozenset(
    (
        *(
            "messages",
            "conversation",
            "tools",
            "documents",
            "chat_template",
            "add_generation_prompt",
        ),
        *(
            "continue_final_message",
            "tokenize",
            "padding",
            "truncation",
            "max_length",
            "return_tensors",
        ),
        *(
            "return_dict",
            "return_assistant_tokens_mask",
            "tokenizer_kwargs",
            "reasoning_effort",
            "add_special_tokens",
        ),
    )
)


def written(engine: Engine, tenant: str, body: Conversation) -> str:
    """The conversation in the tenant's template. Raises RequestError, ApiError,
    TenantUnavailableError."""
    template = engine.text(tenant).chat_template
    options = _options(tenant, body, frozenset() if template is None else variables(template))
    messages = [_for_template(engine, tenant, template, m) for m in body.messages or ()]
    try:
        return engine.text(tenant).render(messages, **options)
    except MoetelError:
        raise
    except (
        Exception
    ) as error:  # templates are programs of the checkpoint's and raise whatever they like
        log.info("chat template of %s: %s: %s", tenant, type(error).__name__, error)
        raise RequestError(
            f"messages: the chat template of tenant {tenant!r} does not take this conversation "
            f"({error}); "
            "mend its roles and their order"
        ) from error


# Variables.


@lru_cache(maxsize=256)
def variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself."""
    import jinja2
    import jinja2.meta

    # transformers' own tag, which marks what the assistant says.
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    env = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(env.parse(plain)))
    except jinja2.TemplateError:
        return frozenset()


def _options(tenant: str, body: Conversation, known: frozenset[str]) -> dict[str, Any]:
    """Of transformers' apply_chat_template. What the template would not read is refused: it would
    change nothing."""

    def require(field: str, *names: str) -> None:
        if not known.intersection(names):
            what = " or ".join(map(repr, names))
            raise ApiError(
                400,
                f"{field}: the chat template of tenant {tenant!r} reads no {what}; leave it out",
                param=field,
            )

    begin = body.add_generation_prompt
    goes_on = bool(body.continue_final_message)
    options: dict[str, Any] = {
        "add_generation_prompt": not goes_on if begin is None else begin,
        "continue_final_message": goes_on,
    }
    given = body.chat_template_kwargs or {}
    for name, value in given.items():
        if name in RESERVED:
            raise ApiError(
                400,
                f"chat_template_kwargs: {name!r} is no variable of a template",
                param="chat_template_kwargs",
            )
        require("chat_template_kwargs", name)
        options[name] = value
    if body.tools:
        require("tools", "tools")
        options["tools"] = [tool.plain() for tool in body.tools]
    if body.documents:
        require("documents", "documents")
        options["documents"] = body.documents
    effort = body.reasoning_effort
    if effort is not None:
        if effort != "none":
            require("reasoning_effort", "reasoning_effort", "enable_thinking")
        # As vLLM does (vllm/entrypoints/openai/chat_completion/protocol.py, `build_chat_params`).
        options = {"enable_thinking": effort != "none"} | options | {"reasoning_effort": effort}
    return options


# Messages.


def _for_template(
    engine: Engine, tenant: str, template: str | None, message: Message
) -> dict[str, Any]:
    """A message as the template reads it: only with the fields that were sent."""
    out: dict[str, Any] = {"role": message.role}
    content: Any = message.content
    text, parts = (
        (True, False) if template is None else forms(engine, tenant, template, message.role)
    )
    if isinstance(content, list):
        content = [_part(part) for part in content]
        if not parts:
            content = "\n".join(part["text"] for part in content)
    elif content is not None and not text:
        content = [{"type": "text", "text": content}]
    if "content" in message.model_fields_set:
        out["content"] = content
    extra = dict(message.model_extra or {})
    if "reasoning" in extra:  # as answers name it; templates have the older name
        extra.setdefault("reasoning_content", extra["reasoning"])
    if isinstance(extra.get("tool_calls"), list):
        extra["tool_calls"] = [_call(call) for call in extra["tool_calls"]]
    if isinstance(extra.get("function_call"), dict):
        extra["function_call"] = _parsed(extra["function_call"])
    return out | extra


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    text = part.text if hasattr(part, "text") else part.refusal
    return (part.model_extra or {}) | {"type": "text", "text": text}


def _call(call: Any) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return call | {"function": _parsed(call["function"])}
    return call


def _parsed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as data: clients send JSON text, and templates write data out."""
    out = dict(function)
    if isinstance(out.get("arguments"), str):
        try:
            out["arguments"] = json.loads(out["arguments"] or "{}")
        except (ValueError, RecursionError):
            log.debug("the arguments of a call are no JSON")
    return out


# What forms a template takes, found by trying: templates read content through macros and variables
# of their own.

_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
_forms: dict[tuple[str, str], tuple[bool, bool]] = {}
_MAX_FORMS = 1024


def forms(engine: Engine, tenant: str, template: str, role: str) -> tuple[bool, bool]:
    """Whether a turn's content may be text, and whether it may be a list of parts; text where
    neither is seen."""
    if (template, role) not in _forms:
        text = _probe(engine, tenant, role, PROBE)
        parts = _probe(engine, tenant, role, [{"type": "text", "text": PROBE}])
        # A template that takes content for text writes the list as Python or JSON does.
        reads = (
            parts is not None and PROBE in parts and re.search(rf"['\"]{PROBE}['\"]", parts) is None
        )
        if len(_forms) >= _MAX_FORMS:
            _forms.clear()
        _forms[template, role] = ((text is not None and PROBE in text) or not reads, reads)
    return _forms[template, role]


def _probe(engine: Engine, tenant: str, role: str, content: Any) -> str | None:
    """The written probe, None if the template refuses it."""
    user = {"role": "user", "content": "Hello"}
    turn = {"role": role, "content": content}
    messages = [user, turn]
    if role == "user":
        messages = [turn]
    elif role in ("system", "developer"):
        messages = [turn, user]
    elif role == "tool":
        call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        messages = [user, call, turn | {"tool_call_id": _CALL["id"]}]
    try:
        return engine.text(tenant).render(messages, add_generation_prompt=False)
    except MoetelError:
        raise
    except Exception:  # whatever a template raises
        return None


# Prompts.


def prompt_ids(
    engine: Engine,
    tenant: str,
    prompt: str | Sequence[int],
    special: bool,
    limit: int | None,
    side: str,
    field: str = "prompt",
) -> list[int]:
    """Token ids of a prompt, at most `limit` of them. Raises RequestError, ApiError,
    TenantUnavailableError.

    special: whether a text gets the tokenizer's special tokens; those stay when it is cut. side:
        where it is cut.
    field: where it came from, for errors.
    """
    before: list[int] = []
    after: list[int] = []
    if isinstance(prompt, str):
        ids = engine.tokenize(tenant, prompt, special)
        if special and limit is not None and len(ids) > limit:
            before, ids, after = _apart(ids, engine.tokenize(tenant, prompt, False))
    else:
        ids = list(prompt)
    if limit is not None:
        room = max(0, limit - len(before) - len(after))
        if len(ids) > room:
            ids = ids[:room] if side == "right" else ids[len(ids) - room :]
    found = [*before, *ids, *after][:limit]
    if not found:
        raise ApiError(400, f"{field}: nothing to go on from; give text, or token ids", param=field)
    return found


def _apart(ids: list[int], plain: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer put before a text, the text, and what it put behind it."""
    for begin in range(len(ids) - len(plain) + 1):
        if ids[begin : begin + len(plain)] == plain:
            return ids[:begin], plain, ids[begin + len(plain) :]
    return [], ids, []


def echoed(engine: Engine, tenant: str, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of a prompt's ids, without a character that they begin and the answer ends."""
    for left in range(min(4, len(ids))):
        text = engine.detokenize(tenant, ids[: len(ids) - left], skip_special_tokens)
        if not text.endswith(REPLACEMENT):
            return text
    return engine.detokenize(tenant, ids, skip_special_tokens)
