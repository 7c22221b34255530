"""What `Engine` says of its store and its texts, without weights."""

from __future__ import annotations

from collections.abc import Sequence

from common.plan.plan import Plan
from common.serving.checks import check_ids
from common.serving.scheduler_options import SchedulerOptions
from common.serving.tenant_text import TenantText
from common.serving.tenant_texts import Texts
from common.store import Store


class StoreFace:
    """The part of `Engine` that the server asks in its own process."""

    def __init__(self, store: Store, options: SchedulerOptions):
        self.store, self.options = store, options
        self._texts = Texts(store)

    @property
    def tenants(self) -> tuple[str, ...]:
        return self.store.tenants

    @property
    def unavailable(self) -> dict[str, str]:
        return {n: why for n, why in self._texts.failures.items() if n in self.tenants}

    @property
    def plan(self) -> Plan:
        return self.store.plan

    def load_texts(self) -> dict[str, str]:
        """Load all tokenizers. Returns `unavailable`."""
        self._texts.load_all()
        return self.unavailable

    def text(self, tenant: str) -> TenantText:
        return self._texts.of(tenant)

    def tokenize(self, tenant: str, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.text(tenant).encode(text, add_special_tokens)

    def detokenize(
        self, tenant: str, token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        tokenizer = self.text(tenant).require("token ids have no text")
        ids = check_ids(tenant, self.store.config(tenant), token_ids, "token_ids")
        return tokenizer.decode(ids, skip_special_tokens)

    def update(self, store: Store) -> None:
        gone = self.store.departed(store)
        self.store = self._texts.store = store
        self._texts.forget(gone.__contains__)
