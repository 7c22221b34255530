"""Texts and answers as rows of token ids, and the logits that score them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.build.examples import CalibrationSet, Prompt
from common.sampling_params import SamplingParams
from common.serving.engine import Engine

# Bytes of logits held at once while they are compared.
LOGITS_BYTES = 1 << 28


@dataclass(frozen=True)
class ScoredRow:
    """Token ids to run, and which logits count.

    An answer's last token is not among them: it is what the last logits are for. Decoder-only:
    prompt holds prompt and answer, whose logits count from `first` on (a text's from 0).
    Encoder-decoder: the prompt, and the answer that the decoder reads after its start token; all of
    the decoder's logits count.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    first: int


def rows_of(engine: Engine, tenant: str, examples: CalibrationSet) -> list[ScoredRow]:
    """Examples as token ids, answers generated where they are not given.

    Raises RequestError for a text without a tokenizer and for a prompt that the tenant cannot take.
    """
    config = engine.store.config(tenant)
    missing = [i for i, e in enumerate(examples.examples) if e.answer is None]
    params = SamplingParams(max_new_tokens=examples.max_new_tokens)
    generated = engine.generate_batch(
        [(tenant, examples.examples[i].prompt) for i in missing], params
    )
    found = dict(zip(missing, generated, strict=True))
    rows = []
    for i, example in enumerate(examples.examples):
        if i in found:
            prompt, answer = found[i].prompt_token_ids, found[i].token_ids
        else:
            prompt = _ids(engine, tenant, example.prompt)
            answer = _answer_ids(engine, tenant, example.answer)
        # An answer's last token (end of sequence, or where the tenant was stopped) is foretold and
        # never read: nothing comes after it when the tenant serves.
        read = tuple(answer[:-1])
        if config.is_encoder_decoder:
            # The decoder reads a start token before the answer.
            rows.append(
                ScoredRow(
                    tuple(prompt[: config.max_positions]), read[: config.max_positions - 1], 0
                )
            )
        else:
            whole = (*prompt, *read)[: config.max_positions]
            rows.append(
                ScoredRow(tuple(whole), (), min(len(prompt), len(whole)) - 1 if answer else 0)
            )
    return rows


def _ids(engine: Engine, tenant: str, prompt: Prompt | None) -> tuple[int, ...]:
    if prompt is None:
        return ()
    return tuple(engine.tokenize(tenant, prompt) if isinstance(prompt, str) else prompt)


def _answer_ids(engine: Engine, tenant: str, answer: Prompt | None) -> tuple[int, ...]:
    if not answer:
        return ()
    return tuple(engine.answer_ids(tenant, answer) if isinstance(answer, str) else answer)


def iter_logits(
    engine: Engine, tenant: str, rows: Sequence[ScoredRow], nbytes: int = LOGITS_BYTES
) -> Iterator[np.ndarray]:
    """The scored logits of each row, float32 [positions, vocab]: as many as its answer, or its
    text, has tokens. nbytes: of logits that are computed at once."""
    config = engine.store.config(tenant)
    start = engine.start_id(tenant) if config.is_encoder_decoder else 0
    longest = max((max(len(r.prompt), len(r.answer) + 1) for r in rows), default=1)
    size = max(1, min(engine.max_batch_size, nbytes // (4 * longest * config.vocab_size)))
    for begin in range(0, len(rows), size):
        chunk = rows[begin : begin + size]
        if config.is_encoder_decoder:
            answers = [[start, *r.answer] for r in chunk]
            found = engine.logits(tenant, [list(r.prompt) for r in chunk], answers)
            for row, values in zip(answers, found, strict=True):
                yield values[: len(row)]
        else:
            found = engine.logits(tenant, [list(r.prompt) for r in chunk])
            for r, values in zip(chunk, found, strict=True):
                yield values[r.first : len(r.prompt)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(own: np.ndarray, served: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence KL(own || served) in nats: float64 [positions], from logits
    [positions, vocab]."""
    p, q = log_softmax(own), log_softmax(served)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))
