"""A tenant of a store as a model of EleutherAI's lm-eval, under the name `moetel`.

Importing this module registers it; `moetel lm-eval` does so and then runs lm-eval's own command.
Contexts, continuations and windows are made as lm-eval's `hf` model makes them, so that both give
the same scores for the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from common import EngineError, RequestError, SamplingParams, Store, UnknownTenantError, load_engine
from common.build.scoring import log_softmax
from scripts.store_views import alone_store

# Bytes of logits that the engine holds at once, whatever the batch size.
LOGITS_BYTES = 1 << 28

# What `generate_until` takes beside the stop strings; other options of transformers' generate() are
# refused by name.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "max_gen_toks", "until")


# Token ids for the engine: of the prompt, and of the decoder for encoder-decoder families.
Row = tuple[tuple[int, ...], tuple[int, ...] | None]


@register_model("moetel")
class MoetelLM(TemplateLM):  # type: ignore[misc]
    """One tenant, as its store serves it.

    store, tenant: which. alone: all its own experts, whatever the store's plan.
    batch_size: rows at once, fewer where their logits would take more than 256 MiB; auto: 32.
    max_length: tokens of context; default: the tenant's. max_gen_toks: longest answer where a task
        does not say; default: 256, or half of max_length.
    add_bos_token: whether texts get the tokenizer's special tokens; default: as the tokenizer does.
    prefix_token_id: what comes before a text without context; default: beginning, else end of
        sequence.
    seed: of sampling; each request adds its number. device: as of `common.load_engine`; cuda:0,
        which lm-eval gives by
        default, stands for auto. Others: the engine's own.

    Raises StoreError, EngineError, UnknownTenantError, RequestError.
    """

    def __init__(
        self,
        store: str,
        tenant: str,
        *,
        alone: bool = False,
        backend: str = "auto",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        **options: Any,
    ):
        super().__init__()
        self.tenant = str(tenant)  # lm-eval turns `tenant=1` into a number
        opened = Store.open(
            Path(str(store)).expanduser()
        )  # lm-eval's arguments are no words of a shell
        if self.tenant not in opened.tenants:
            raise UnknownTenantError(self.tenant, opened.tenants)
        if alone:
            opened = alone_store(opened, [self.tenant])
        if device in (None, "cuda", "cuda:0"):
            # lm-eval says cuda:0 where nothing was asked for; its models fall back to the CPU too.
            device = "auto"
        rows = 32 if str(batch_size).startswith("auto") else int(batch_size)
        if rows < 1:
            raise EngineError(f"batch_size is {batch_size!r}; give a whole number from 1, or auto")
        self.batch_size = min(rows, max_batch_size or rows)
        self.engine = load_engine(
            opened,
            backend=backend,
            device=device,
            dtype=dtype,
            max_batch_size=self.batch_size,
            **options,
        )
        if not self.engine.text(self.tenant).has_tokenizer:
            raise RequestError(
                f"tenant {self.tenant!r} has no tokenizer; lm-eval's tasks are texts"
            )
        self._config = opened.config(self.tenant)
        self.backend = "seq2seq" if self._config.is_encoder_decoder else "causal"
        longest = self._config.max_positions
        if max_length is not None and not 1 < max_length <= longest:
            raise EngineError(
                f"max_length is {max_length}; tenant {self.tenant!r} has a context of {longest}"
            )
        self.max_length = max_length or longest
        self.max_gen_toks = max_gen_toks or min(256, self.max_length // 2)
        self._add_bos, self._prefix, self._seed = add_bos_token, prefix_token_id, seed

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, from the store's files alone."""
        from transformers import AutoTokenizer

        folder = self.engine.store.assets_dir(self.tenant)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @property
    def tokenizer_name(self) -> str:
        return f"moetel__{self.engine.store.tenant(self.tenant).assets_folder}"

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        if found is None:
            raise RequestError(
                f"the tokenizer of tenant {self.tenant!r} names no end-of-sequence token"
            )
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. add_special_tokens: None: as the tokenizer does, but no second beginning of
        sequence."""
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        about = self.engine.store.describe()
        kept = (
            "family",
            "dtype",
            "positions",
            "resident_copies",
            "residual_bytes",
            "extra_bytes",
            "bytes_budget",
        )
        return {
            "moetel_store": str(self.engine.store.path),
            "moetel_tenant": self.tenant,
            "moetel_policy": self.engine.plan.policy,
        } | {f"moetel_{name}": about[name] for name in kept}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is greedy) for each (key, context,
        continuation)."""
        # Choices of one token share a row, so each different row is computed once.
        rows: dict[Row, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens behind a context of "
                    f"{len(context)}: both need at "
                    f"least one, and the continuation at most {self.max_length}"
                )
            if self.backend == "causal":
                row: Row = (tuple((*context, *continuation)[-(self.max_length + 1) :][:-1]), None)
            else:
                start = self.engine.start_id(self.tenant)
                row = (tuple(context[-self.max_length :]), (start, *continuation[:-1]))
            rows.setdefault(row, []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            for row, logits in self._logits(list(rows)):
                for i in rows[row]:
                    key, _, continuation = requests[i]
                    scored = logits[len(logits) - len(continuation) :]
                    chosen = log_softmax(scored)[np.arange(len(continuation)), continuation]
                    greedy = bool((scored.argmax(axis=-1) == continuation).all())
                    answers[i] = (float(chosen.sum()), greedy)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[i])
                bar.update(len(rows[row]))
        return answers

    def _logits(self, rows: list[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        """Each row with its logits, float32 [tokens, vocab], longest rows first."""
        rows.sort(key=lambda row: -len(row[1] or row[0]))
        begin = 0
        while begin < len(rows):
            longest = len(rows[begin][1] or rows[begin][0])
            size = max(
                1, min(self.batch_size, LOGITS_BYTES // (8 * longest * self._config.vocab_size))
            )
            part = rows[begin : begin + size]
            decoder = [list(d) for _, d in part if d is not None]
            found = self.engine.logits(self.tenant, [list(ids) for ids, _ in part], decoder or None)
            for row, values in zip(part, found, strict=True):
                yield row, values[: len(row[1] or row[0])]
            begin += len(part)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length` tokens."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(window)) for window in found]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each ended before the first of its stop strings."""
        asked = []
        for number, request in enumerate(requests):
            context, options = request.args
            params = self._sampling(options, number)
            # As much of the context's end as leaves room for the answer.
            room = self.max_length - (params.max_new_tokens if self.backend == "causal" else 0)
            if room < 1:
                raise RequestError(
                    f"answers of {params.max_new_tokens} tokens leave no room for a prompt in "
                    f"{self.max_length}; give "
                    "a smaller max_gen_toks with --gen_kwargs"
                )
            asked.append((self.tok_encode(context)[-room:], params))
        # Requests of like length are decoded together.
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))
        answers = [""] * len(asked)
        with tqdm(
            total=len(asked), disable=disable_tqdm, desc="Running generate_until requests"
        ) as bar:
            for begin in range(0, len(order), self.batch_size):
                part = order[begin : begin + self.batch_size]
                found = self.engine.generate_batch(
                    [(self.tenant, asked[i][0]) for i in part], [asked[i][1] for i in part]
                )
                for i, out in zip(part, found, strict=True):
                    answers[i] = out.text or ""
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update(len(part))
        return answers

    def _sampling(self, options: dict[str, Any], number: int) -> SamplingParams:
        given = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        unknown = sorted(name for name in given if name not in SAMPLING)
        if unknown:
            raise RequestError(
                f"generation option {unknown[0]!r} is not supported; there is: "
                f"{', '.join(SAMPLING)}"
            )
        until = [s for s in handle_stop_sequences(given["until"], eos=None) if s]
        return SamplingParams(
            max_new_tokens=given["max_gen_toks"],
            temperature=float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p") or 1.0),
            seed=self._seed + number,
            stop=until,
            stop_token_ids=[self.eot_token_id],
        )
