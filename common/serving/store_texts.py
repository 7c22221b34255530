"""What is asked of a store and its tenants' texts, without weights: of an engine, and of a process
whose engines are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.plan.plan import Plan
from common.serving.checks import check_ids
from common.serving.scheduler_options import SchedulerOptions
from common.serving.tenant_text import TenantText
from common.serving.tenant_texts import Texts
from common.store import Store


class StoreTexts:
    """The part of `Engine` that needs no weights."""

    def __init__(self, store: Store, options: SchedulerOptions):
        self.store, self.options = store, options
        self._texts = Texts(store)

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names."""
        return self.store.tenants

    @property
    def unavailable(self) -> dict[str, str]:
        """Tenant -> why it cannot be asked, as far as tenants were loaded: see `load_texts`.

        One whose tokenizer cannot be loaded still answers prompts of token ids.
        """
        return {n: why for n, why in self._texts.failures.items() if n in self.tenants}

    def load_texts(self) -> dict[str, str]:
        """Load every tenant's tokenizer, so that no first request waits for it.

        Returns `unavailable`.
        """
        self._texts.load_all()
        return self.unavailable

    def text(self, tenant: str) -> TenantText:
        """A tenant's tokenizer, chat template and generation config.

        Raises UnknownTenantError, TenantUnavailableError.
        """
        return self._texts.of(tenant)

    @property
    def plan(self) -> Plan:
        """Which copies are resident, and which of them serves whom."""
        return self.store.plan

    def tokenize(self, tenant: str, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens or without."""
        return self._texts.of(tenant).encode(text, add_special_tokens)

    def answer_ids(self, tenant: str, text: str) -> list[int]:
        """Token ids of a text as the tenant would answer it, up to an end-of-sequence token."""
        return self._texts.of(tenant).encode_answer(text)

    def detokenize(
        self, tenant: str, token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids. Raises RequestError without a tokenizer."""
        tokenizer = self._texts.of(tenant).require("token ids have no text")
        return tokenizer.decode(
            check_ids(tenant, self.store.config(tenant), token_ids, "token_ids"),
            skip_special_tokens,
        )

    def apply_chat_template(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation in the tenant's chat template: a prompt for `generate`.

        `options` are those of transformers' `apply_chat_template`, such as `add_generation_prompt`
        (here true if not given), `continue_final_message`, and variables of the template.
        """
        return self._texts.of(tenant).chat(messages, add_special_tokens, **options)

    def update(self, store: Store) -> None:
        """Go on with a changed store: tenants added, tenants removed, another plan."""
        gone = self.store.departed(store)
        self.store = self._texts.store = store
        self._texts.forget(gone.__contains__)
