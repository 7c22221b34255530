"""All tenants' tokenizers and generation configs, each loaded when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from common.errors import CheckpointError, TenantUnavailableError
from common.serving.tenant_text import TenantText
from common.store import Store


class Texts:
    """Loads and keeps a store's `TenantText`s."""

    def __init__(self, store: Store):
        self.store = store
        self._loaded: dict[str, TenantText] = {}
        self._unusable: dict[str, str] = {}

    def of(self, tenant: str) -> TenantText:
        """A tenant's text. Raises UnknownTenantError, TenantUnavailableError."""
        if tenant not in self._loaded:
            assets = self.store.assets_dir(tenant)
            try:
                generation = self.store.generation(tenant)
            except CheckpointError as error:
                self._unusable[tenant] = f"{error}; mend the checkpoint's file and build again"
                raise TenantUnavailableError(tenant, self._unusable[tenant]) from error
            self._loaded[tenant] = TenantText(tenant, assets, generation)
        return self._loaded[tenant]

    def load_all(self) -> None:
        """Load every tenant's text, so that no first request waits for it."""
        for tenant in self.store.tenants:
            with suppress(TenantUnavailableError):
                self.of(tenant)

    @property
    def failures(self) -> dict[str, str]:
        """Tenant -> why it cannot be asked, as far as tenants were loaded.

        One whose tokenizer cannot be loaded still answers prompts of token ids.
        """
        failed = {name: text.failure for name, text in self._loaded.items()}
        return {name: why for name, why in failed.items() if why is not None} | self._unusable

    def forget(self, gone: Callable[[str], bool]) -> None:
        """Drop what was loaded of tenants that are gone."""
        for kept in (self._loaded, self._unusable):
            for name in [n for n in kept if gone(n)]:
                del kept[name]
