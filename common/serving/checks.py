"""What a request may be: token ids in range, room for an answer, options that can be served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.errors import RequestError
from common.families import ModelConfig
from common.sampling_params import SamplingParams
from common.serving.request import Request
from common.serving.tenant_text import TenantText

Prompt = str | Sequence[int]


def check_ids(tenant: str, config: ModelConfig, ids: Sequence[int], what: str) -> tuple[int, ...]:
    """Token ids of a tenant. Raises RequestError that names the first wrong one.

    Args:
        what: the name of `ids` in messages.
    """
    checked = []
    for i, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            raise RequestError(f"{what}[{i}] is {token_id!r}; token ids are whole numbers")
        if not 0 <= token_id < config.vocab_size:
            raise RequestError(
                f"{what}[{i}] is {int(token_id)}, outside the vocabulary of tenant {tenant!r} "
                f"(0..{config.vocab_size - 1})"
            )
        checked.append(int(token_id))
    if not checked:
        raise RequestError(f"{what} is empty; give at least one token")
    if len(checked) > config.max_positions:
        raise RequestError(
            f"{what} has {len(checked)} tokens, tenant {tenant!r} has a context of "
            f"{config.max_positions}; shorten it"
        )
    return tuple(checked)


def check_request(
    text: TenantText,
    config: ModelConfig,
    prompt: Prompt,
    params: SamplingParams,
    max_length: int,
    taken_at: float,
) -> Request:
    """A prompt and its options as a request. Raises RequestError, TenantUnavailableError.

    Args:
        max_length: tokens that a sequence of the tenant can hold.
        taken_at: seconds, of `time.perf_counter`.
    """
    tenant = text.tenant
    ids = check_ids(tenant, config, _prompt_ids(text, prompt), "the prompt")
    if len(ids) > max_length:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, there is room for {max_length} of tenant "
            f"{tenant!r} (max_model_len, kv_cache_bytes); shorten it, or give the engine more"
        )
    room = max_length - (0 if config.is_encoder_decoder else len(ids))
    if room < 1:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and fills the context of tenant {tenant!r} "
            f"({max_length}); shorten it to leave room for an answer"
        )
    if params.prompt_logprobs is not None and config.is_encoder_decoder:
        raise RequestError(
            f"tenant {tenant!r} is an encoder-decoder: it reads a prompt and gives its tokens no "
            "probabilities; leave out prompt_logprobs, and echo beside logprobs"
        )
    if params.stop_strings and not text.has_tokenizer:
        raise RequestError(
            f"tenant {tenant!r} has no tokenizer, so stop strings cannot be found; use "
            "stop_token_ids"
        )
    for token_id in params.logit_bias or {}:
        if not 0 <= token_id < config.vocab_size:
            raise RequestError(
                f"logit_bias names token {token_id}, outside the vocabulary of tenant "
                f"{tenant!r} (0..{config.vocab_size - 1})"
            )
    grammar = None
    if params.structured_outputs is not None:
        grammar = text.grammar(params.structured_outputs, config.vocab_size)
    if params.min_tokens > room:
        params = replace(params, min_tokens=room)
    return Request(
        tenant=tenant,
        prompt=ids,
        max_new_tokens=min(params.max_new_tokens, room),
        params=params,
        text=text,
        taken_at=taken_at,
        is_encoder_decoder=config.is_encoder_decoder,
        grammar=grammar,
    )


def _prompt_ids(text: TenantText, prompt: Prompt) -> Sequence[int]:
    if isinstance(prompt, str):
        ids = text.encode(prompt)
        if not ids:
            raise RequestError("the prompt is empty; give some text")
        return ids
    try:
        return list(prompt)
    except TypeError as error:
        raise RequestError(f"the prompt is {prompt!r}; give text or a list of token ids") from error
