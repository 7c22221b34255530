"""The one Python interface to every engine, and the generation loop that they share.

An engine supplies a `Backend`: logits for rows of tokens. Everything that a user sees (checking of requests,
sampling, stopping, text, results, statistics) is here, once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np

from common.consolidation import Plan
from common.errors import EngineError, RequestError, UnknownTenantError
from common.sampling import SamplingParams, sample
from common.store import Store
from common.text import TenantText, TextStream

Prompt = str | Sequence[int]
FinishReason = Literal["stop", "length"]

GREEDY = SamplingParams()

# The engine of each family.
BACKENDS = {"mixtral": "torch", "switch_transformers": "jax"}


@dataclass(frozen=True)
class Timings:
    """Seconds on one clock from the moment that the engine took the request, and expert look-ups of this request.

    reconfiguration: making the tenant's non-expert weights the ones in use, 0 if they were.
    ttft: until the first token; total: until the last.
    hits: look-ups that a resident copy served (tokens * layers * top_k in all); misses: those that needed the
        tenant's own expert.
    """

    reconfiguration: float
    ttft: float
    total: float
    hits: int
    misses: int


@dataclass(frozen=True)
class Generation:
    """An answer. token_ids: the new tokens alone, an end-of-sequence token included. text: None without a tokenizer."""

    tenant: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class Row:
    """One sequence handed to a backend."""

    tenant: str
    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Step:
    """What one step gave, a row for each live sequence.

    token_ids: int64 [rows], the most probable next token.
    logits: float32 [rows, vocab] (padded with -inf to the widest vocabulary), or None if it was not asked for.
    hits, misses: int64 [rows], expert look-ups of this step.
    """

    token_ids: np.ndarray
    logits: np.ndarray | None
    hits: np.ndarray
    misses: np.ndarray


class Batch(Protocol):
    """Sequences that are decoded together; holds their caches."""

    reconfiguration_s: dict[str, float]

    def prefill(self, want_logits: bool) -> Step:
        """Read the prompts. Called once, first."""
        ...

    def decode(self, token_ids: np.ndarray, want_logits: bool) -> Step:
        """Append one token to each live row, int64 [rows], and give what comes next."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (indices into the live rows, ascending)."""
        ...


Observer = Callable[[str, int, np.ndarray, np.ndarray, np.ndarray], np.ndarray | None]
"""Sees every layer's routing: (tenant, layer, x float32 [T, H], expert_ids int64 [T, K], gates float32 [T, K]).

x is what the experts read; padding, and tokens that no expert takes, are left out. What it returns, float32 [T, H], is
added to the weighted sum of the experts' outputs.
"""


class Backend(ABC):
    """Turns tokens into logits for the tenants of one store; keeps weights and caches on its device."""

    max_ready_tenants: int
    """How many tenants' non-expert weights fit at once; a batch never names more."""

    @abstractmethod
    def start(self, rows: Sequence[Row]) -> Batch:
        """Begin a batch. Rows of one tenant are adjacent."""

    @abstractmethod
    def logits(
        self, tenant: str, rows: Sequence[Sequence[int]], decoder_rows: Sequence[Sequence[int]] | None
    ) -> list[np.ndarray]:
        """float32 [tokens, vocab] for every row, at every position."""

    def start_id(self, name: str) -> int | None:
        """The token that a tenant's answers are decoded from; None where they go on from the prompt."""
        return None

    @abstractmethod
    def observe(self, observer: Observer | None) -> None:
        """Show every step's routing to `observer`, after the router and before the experts; None: stop.

        For calibration; slower than serving.
        """

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Device, type, bytes held, hits, misses, fetches, reconfigurations."""

    @abstractmethod
    def close(self) -> None:
        """Free the device. Safe to call twice."""


@dataclass
class _Sequence:
    """A request on its way: what was asked, and what came so far."""

    row: Row
    params: SamplingParams
    text: TenantText
    stream: TextStream | None
    rng: np.random.Generator
    eos: frozenset[int]
    taken_at: float
    token_ids: list[int] = field(default_factory=list)
    first_at: float = 0.0
    last_at: float = 0.0
    hits: int = 0
    misses: int = 0
    finish_reason: FinishReason | None = None
    reconfiguration_s: float = 0.0

    def accept(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain. Sets `finish_reason` at the end."""
        self.token_ids.append(token_id)
        self.last_at = time.perf_counter()
        if len(self.token_ids) == 1:
            self.first_at = self.last_at
        if token_id in self.eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.row.max_new_tokens:
            self.finish_reason = "length"
        if self.stream is None:
            return ""
        if token_id in self.eos:  # ends the answer and is no part of its text
            return self.stream.finish()
        piece = self.stream.push(token_id, last=self.finish_reason is not None)
        if self.stream.stopped:
            self.finish_reason = "stop"
        return piece

    def result(self) -> Generation:
        assert self.finish_reason is not None
        return Generation(
            tenant=self.row.tenant,
            prompt_token_ids=self.row.prompt,
            token_ids=tuple(self.token_ids),
            text=None if self.stream is None else self.stream.emitted,
            finish_reason=self.finish_reason,
            timings=Timings(
                self.reconfiguration_s,
                self.first_at - self.taken_at,
                self.last_at - self.taken_at,
                self.hits,
                self.misses,
            ),
        )


class Engine:
    """Answers for every tenant of a store. Make one with `load_engine`; a context manager, or call `close()`.

    Not safe for use by several threads at once.
    """

    def __init__(self, store: Store, backend: Backend, max_batch_size: int = 32):
        if not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise EngineError(f"max_batch_size is {max_batch_size!r}; give a whole number from 1")
        self.store = store
        self.max_batch_size = max_batch_size
        self._backend: Backend | None = backend
        self._texts: dict[str, TenantText] = {}

    @property
    def tenants(self) -> tuple[str, ...]:
        return self.store.tenants

    @property
    def plan(self) -> Plan:
        return self.store.plan

    def generate(self, tenant: str, prompt: Prompt, params: SamplingParams = GREEDY) -> Generation:
        """Continue a prompt (text, or token ids) as the tenant would.

        Raises UnknownTenantError, or RequestError for an empty or too long prompt, ids out of range, text without a
        tokenizer.
        """
        return self.generate_batch([(tenant, prompt)], params)[0]

    def generate_batch(
        self, requests: Sequence[tuple[str, Prompt]], params: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[Generation]:
        """Answers in the order of the requests, which may name different tenants and are decoded together.

        params: one for all, or one for each. Every request is checked before the first is answered.
        """
        each = [params] * len(requests) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(requests):
            raise RequestError(
                f"{len(each)} sampling params for {len(requests)} requests; give one for all, or one for each"
            )
        sequences = [self._sequence(t, p, s) for (t, p), s in zip(requests, each, strict=True)]
        for group in self._groups(sequences):
            for _ in self._run(group):
                pass
        return [s.result() for s in sequences]

    def stream(self, tenant: str, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[str]:
        """Pieces of the answer's text as they become certain; no piece ends inside a character.

        The request is checked when this is called, not at the first piece. Raises RequestError without a tokenizer.
        """
        sequence = self._sequence(tenant, prompt, params)
        if sequence.stream is None:
            raise RequestError(f"tenant {tenant!r} has no tokenizer, so it has no text to stream; use generate()")
        return (piece for _, piece in self._run([sequence]) if piece)

    def logits(
        self,
        tenant: str,
        input_ids: Any,
        decoder_input_ids: Any = None,
        attention_mask: Any = None,
    ) -> np.ndarray:
        """Logits at every position, for tests and scoring: float32 [batch, seq, vocab], vocab the tenant's own.

        input_ids: int [batch, seq], or rows of different lengths. attention_mask: int [batch, seq], 1 at the tokens,
        padding on either side; padded positions are not computed and come back as 0.
        decoder_input_ids: int [batch, seq], for encoder-decoder families, whose logits are at its positions.
        """
        backend = self._require_backend()
        rows = _rows(input_ids, "input_ids")
        places = [np.arange(len(row)) for row in rows]
        if attention_mask is not None:
            mask = [np.asarray(m).astype(bool) for m in attention_mask]
            if len(mask) != len(rows) or any(len(m) != len(r) for m, r in zip(mask, rows, strict=True)):
                raise RequestError("attention_mask has another shape than input_ids")
            places = [np.flatnonzero(m) for m in mask]
            if any(len(p) and p[-1] - p[0] + 1 != len(p) for p in places):
                raise RequestError(
                    "attention_mask has a gap; give 1 at adjacent tokens of a row and 0 before or after them"
                )
        if tenant not in self.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        if self.store.config(tenant).is_encoder_decoder != (decoder_input_ids is not None):
            what = "needs decoder_input_ids as well" if decoder_input_ids is None else "reads input_ids alone"
            raise RequestError(f"family {self.store.family.name!r} {what}; give what its Hugging Face model takes")
        prompts = [
            self._check_ids(tenant, [row[i] for i in place], "input_ids")
            for row, place in zip(rows, places, strict=True)
        ]
        decoder_rows = None
        if decoder_input_ids is not None:
            decoder_rows = [
                self._check_ids(tenant, r, "decoder_input_ids") for r in _rows(decoder_input_ids, "decoder_input_ids")
            ]
            if len(decoder_rows) != len(rows):
                raise RequestError(f"{len(decoder_rows)} rows of decoder_input_ids for {len(rows)} of input_ids")
        found = backend.logits(tenant, prompts, decoder_rows)
        if decoder_rows is not None:
            places = [np.arange(len(r)) for r in decoder_rows]
            width = max(len(r) for r in decoder_rows)
        else:
            width = max(len(r) for r in rows)
        out = np.zeros((len(found), width, found[0].shape[-1]), dtype=np.float32)
        for i, (place, values) in enumerate(zip(places, found, strict=True)):
            out[i, place] = values
        return out

    def has_tokenizer(self, tenant: str) -> bool:
        """Whether prompts of this tenant can be text. Raises UnknownTenantError."""
        return self._text(tenant).has_tokenizer

    def tokenize(self, tenant: str, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens."""
        return self._text(tenant).encode(text)

    def answer_ids(self, tenant: str, text: str) -> list[int]:
        """Token ids of a text as the tenant would answer it: of special tokens only the end-of-sequence one."""
        return self._text(tenant).encode_answer(text)

    def start_id(self, tenant: str) -> int:
        """The token that answers of an encoder-decoder tenant are decoded from. Raises RequestError for others."""
        found = self._require_backend().start_id(tenant) if tenant in self.tenants else None
        if found is None:
            raise RequestError(f"tenant {tenant!r} has no decoder start token; its answers go on from the prompt")
        return found

    def apply_chat_template(self, tenant: str, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the tenant's chat template: a prompt for `generate`."""
        return self._text(tenant).chat(messages)

    def observe(self, observer: Observer | None) -> None:
        """Show every layer's routing to `observer` from now on, None to stop; see `Observer`."""
        self._require_backend().observe(observer)

    def stats(self) -> dict[str, Any]:
        """What the engine holds and has done: bytes by kind, hits, misses, fetches, reconfigurations."""
        return self._require_backend().stats()

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_backend(self) -> Backend:
        if self._backend is None:
            raise EngineError("this engine is closed; load it again with load_engine()")
        return self._backend

    def _text(self, tenant: str) -> TenantText:
        if tenant not in self._texts:
            self._texts[tenant] = TenantText(tenant, self.store.assets_dir(tenant))
        return self._texts[tenant]

    def _check_ids(self, tenant: str, ids: Sequence[int], what: str) -> tuple[int, ...]:
        config = self.store.config(tenant)
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
                f"{what} has {len(checked)} tokens, tenant {tenant!r} has a context of {config.max_positions}; "
                "shorten it"
            )
        return tuple(checked)

    def _sequence(self, tenant: str, prompt: Prompt, params: SamplingParams) -> _Sequence:
        taken_at = time.perf_counter()
        self._require_backend()
        if tenant not in self.tenants:
            raise UnknownTenantError(tenant, self.tenants)
        text = self._text(tenant)
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give some text")
            ids: Sequence[int] = text.encode(prompt)
        else:
            try:
                ids = list(prompt)
            except TypeError as error:
                raise RequestError(f"the prompt is {prompt!r}; give text or a list of token ids") from error
        checked = self._check_ids(tenant, ids, "the prompt")
        config = self.store.config(tenant)
        room = config.max_positions - (0 if config.is_encoder_decoder else len(checked))
        if room < 1:
            raise RequestError(
                f"the prompt has {len(checked)} tokens and fills the context of tenant {tenant!r} "
                f"({self.store.config(tenant).max_positions}); shorten it to leave room for an answer"
            )
        if params.stop_strings and not text.has_tokenizer:
            raise RequestError(
                f"tenant {tenant!r} has no tokenizer, so stop strings cannot be found; use stop_token_ids"
            )
        return _Sequence(
            row=Row(tenant, checked, min(params.max_new_tokens, room)),
            params=params,
            text=text,
            stream=TextStream(text, params.stop_strings) if text.has_tokenizer else None,
            rng=np.random.default_rng(params.seed),
            eos=(frozenset() if params.ignore_eos else text.eos_token_ids) | frozenset(params.stop_token_ids or ()),
            taken_at=taken_at,
        )

    def _groups(self, sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
        """Cut requests into batches: rows of a tenant adjacent, no more tenants than are ready at once."""
        first_seen = {t: i for i, t in reversed(list(enumerate(s.row.tenant for s in sequences)))}
        group: list[_Sequence] = []
        for sequence in sorted(sequences, key=lambda s: first_seen[s.row.tenant]):
            tenants = {s.row.tenant for s in group} | {sequence.row.tenant}
            if len(group) == self.max_batch_size or len(tenants) > self._require_backend().max_ready_tenants:
                yield group
                group = []
            group.append(sequence)
        if group:
            yield group

    def _run(self, sequences: list[_Sequence]) -> Iterator[tuple[_Sequence, str]]:
        """Decode a batch to its end; yields every (sequence, new text)."""
        want_logits = not all(s.params.greedy for s in sequences)
        batch = self._require_backend().start([s.row for s in sequences])
        live = list(sequences)
        step = batch.prefill(want_logits)
        for sequence in live:
            sequence.reconfiguration_s = batch.reconfiguration_s.get(sequence.row.tenant, 0.0)
        while True:
            next_ids = np.zeros(len(live), dtype=np.int64)
            for i, sequence in enumerate(live):
                sequence.hits += int(step.hits[i])
                sequence.misses += int(step.misses[i])
                if sequence.params.greedy:
                    next_ids[i] = step.token_ids[i]
                else:
                    assert step.logits is not None
                    next_ids[i] = sample(step.logits[i], sequence.params, sequence.rng)
                yield sequence, sequence.accept(int(next_ids[i]))
            going = [i for i, s in enumerate(live) if s.finish_reason is None]
            if not going:
                return
            if len(going) < len(live):
                batch.keep(going)
                live = [live[i] for i in going]
            step = batch.decode(next_ids[going], want_logits)


def _rows(ids: Any, what: str) -> list[list[int]]:
    """[batch, seq] of anything array-like, or rows of different lengths, as lists."""
    rows = (
        ids.tolist()
        if hasattr(ids, "tolist")
        else [list(r) if isinstance(r, Sequence) else getattr(r, "tolist", lambda r=r: r)() for r in ids]
    )
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        raise RequestError(f"{what} must be [batch, seq]: a list of rows of token ids with at least one row")
    return rows


def load_engine(
    store: str | Path | Store,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    max_batch_size: int = 32,
    **options: Any,
) -> Engine:
    """Load a store for inference.

    backend: auto picks by family (mixtral: torch, switch_transformers: jax). device: auto takes a GPU if there is one.
    dtype: auto is the store's; float32 or bfloat16 to override.
    options: the backend's own, see `torch_engine.TorchOptions` and `jax_engine.JaxOptions`.

    Raises StoreError, EngineError.
    """
    opened = store if isinstance(store, Store) else Store.open(store)
    wanted = BACKENDS[opened.family.name] if backend == "auto" else backend
    if wanted != BACKENDS[opened.family.name]:
        raise EngineError(
            f"backend {backend!r} does not serve family {opened.family.name!r}; use {BACKENDS[opened.family.name]!r}"
        )
    load = _torch_backend if wanted == "torch" else _jax_backend
    return Engine(opened, load(opened, device=device, dtype=dtype, **options), max_batch_size)


def _torch_backend(store: Store, **options: Any) -> Backend:
    try:
        import torch_engine.backend
    except ImportError as error:
        raise EngineError(f"the torch backend is not installed ({error}); run: pip install 'moetel[torch]'") from error
    return torch_engine.load_backend(store, **options)


def _jax_backend(store: Store, **options: Any) -> Backend:
    try:
        import jax_engine.backend
    except ImportError as error:
        raise EngineError(f"the jax backend is not installed ({error}); run: pip install 'moetel[jax]'") from error
    return jax_engine.load_backend(store, **options)
