"""What a store gives on the device: pool, residuals, ready tenants. Replaced as a whole when the
store has changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import CheckpointError, StoreError
from common.families.switch_transformers import SwitchTransformersConfig, as_switch
from common.store import Store
from jax_engine.devices import Devices
from jax_engine.experts.dispatch import Dispatch
from jax_engine.experts.pool import ExpertPool, slots_of_plan
from jax_engine.experts.products import NativeProducts, Products
from jax_engine.experts.residuals import LoadedResiduals
from jax_engine.models.encoder_decoder import Settings
from jax_engine.options import JaxOptions
from jax_engine.steps.compiled import Compiled
from jax_engine.steps.layered import Experts
from jax_engine.steps.steps import Steps
from jax_engine.tenants.ready import Architecture, ReadyTenant, ReadyTenants


class Loaded:
    """The weights of one state of a store, and the compiled steps that fit them."""

    store: Store
    experts: Experts
    pool: ExpertPool
    residuals: LoadedResiduals
    ready: ReadyTenants
    _vocab_size: int

    def __init__(
        self,
        store: Store,
        devices: Devices,
        products: Products,
        dispatch: Dispatch,
        options: JaxOptions,
        compiled: Compiled,
        before: Loaded | None = None,
    ):
        """before: the last state, of which what has not changed is taken over; it stays as it is.
        Raises StoreError, EngineError."""
        self.store = store
        self._products, self._dispatch, self._capacity, self._compiled = (
            products,
            dispatch,
            options.expert_capacity,
            compiled,
        )
        layers, slot_of = slots_of_plan(store.plan)
        self._slots = tuple(devices.slots(len(slots)) for slots in layers)
        # Never narrower than before: a tenant that goes must not change the shapes of those that
        # stay.
        widest = max(store.config(name).vocab_size for name in store.tenants)
        self._vocab_size = max(widest, before._vocab_size if before else 0)
        same = before is not None and (before._slots, before._vocab_size) == (
            self._slots,
            self._vocab_size,
        )
        self._architectures: dict[Any, Architecture] = (
            dict(before._architectures) if before and same else {}
        )
        self._steps: dict[Any, Steps] = dict(before._steps) if before and same else {}
        try:
            first = self._architecture_of(as_switch(store.config(store.tenants[0])))
            self.experts = before.experts if before and same else Experts(first.settings, compiled)
            self.pool = ExpertPool(
                store,
                first,
                layers,
                options.spare_slots,
                devices.by_slot,
                devices.everywhere,
                before.pool if before else None,
            )
            blocked = isinstance(products, NativeProducts)
            self.residuals = LoadedResiduals(
                store,
                slot_of,
                self._slots,
                devices.everywhere,
                blocked,
                before.residuals if before else None,
            )
            self.ready = ReadyTenants(
                store,
                min(len(store.tenants), options.ready_tenants or len(store.tenants)),
                self._architecture_of,
                slot_of,
                self.residuals,
                np.any(store.plan.serving < 0, axis=(1, 2)),
                devices.everywhere,
                before.ready if before else None,
            )
        except CheckpointError as error:
            raise StoreError(f"{error}; run `moetel verify {store.path}`") from error
        self.start_ids = {name: self._start_id(name) for name in store.tenants}

    def config(self, name: str) -> SwitchTransformersConfig:
        return as_switch(self.store.config(name))

    def _architecture_of(self, config: SwitchTransformersConfig) -> Architecture:
        key = config.architecture
        if key not in self._architectures:
            capacity = config.expert_capacity if self._capacity == "config" else self._capacity
            assert capacity is None or isinstance(capacity, int)
            settings = Settings(
                config, self._products, self._dispatch, self._slots, self._vocab_size, capacity
            )
            self._architectures[key] = Architecture.of(settings)
        return self._architectures[key]

    def steps(self, tenant: ReadyTenant) -> Steps:
        """The compiled computation for a tenant; tenants of one architecture share it."""
        key = tenant.config.architecture
        if key not in self._steps:
            self._steps[key] = Steps(tenant.architecture, self._compiled)
        return self._steps[key]

    def _start_id(self, name: str) -> int:
        """The token that answers are decoded from. A tenant without a decision is refused by the
        engine."""
        try:
            found = self.store.generation(name).decoder_start_token_id
        except CheckpointError:
            found = None
        return self.config(name).decoder_start_token_id if found is None else found

    def close(self) -> None:
        self.pool.close()
        self.ready.close()
        self.residuals.close()
        self._steps.clear()
