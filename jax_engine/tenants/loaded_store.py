"""What a store gives on the device: pool, residuals, ready tenants. Replaced as a whole when the
store has changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import CheckpointError, StoreError
from common.families import EncoderDecoder
from common.store import Store
from jax_engine.devices import Devices
from jax_engine.experts.dispatch import Dispatch
from jax_engine.experts.pool import DevicePool, slots_of_plan
from jax_engine.experts.products import NativeProducts, Products
from jax_engine.experts.residuals import LoadedResiduals
from jax_engine.models.architecture import Architecture
from jax_engine.models.spec import ModelSpec, check_shape, computed_shape
from jax_engine.options import JaxOptions
from jax_engine.steps.compilation import CountedJit
from jax_engine.steps.compiled import CompiledSteps
from jax_engine.steps.expert_runner import ExpertRunner
from jax_engine.tenants.ready import DeviceTenants, ReadyTenant


@dataclass(frozen=True)
class Computing:
    """How an engine computes, whatever the store."""

    devices: Devices
    products: Products
    dispatch: Dispatch
    options: JaxOptions
    jit: CountedJit


class LoadedStore:
    """The weights of one state of a store, and the compiled steps that fit them."""

    expert_runner: ExpertRunner
    pool: DevicePool
    residuals: LoadedResiduals
    ready: DeviceTenants
    _vocab_size: int

    def __init__(self, store: Store, computing: Computing, before: LoadedStore | None = None):
        """Load all that is ready at once.

        Args:
            before: the last state, of which what has not changed is taken over; it stays as it is.
        Raises:
            StoreError: for damaged files.
            EngineError: for a shape that is not computed here.
        """
        self.store, self._computing = store, computing
        devices, options = computing.devices, computing.options
        layers, slot_of = slots_of_plan(store.plan)
        self._slots = tuple(devices.slots(len(slots)) for slots in layers)
        # Never narrower than before: a tenant that goes must not change the shapes of those that
        # stay.
        widest = max(store.config(name).vocab_size for name in store.tenants)
        self._vocab_size = max(widest, before._vocab_size if before else 0)
        mine = (self._slots, self._vocab_size)
        same = before is not None and (before._slots, before._vocab_size) == mine
        self._architectures: dict[EncoderDecoder, Architecture] = (
            dict(before._architectures) if before and same else {}
        )
        self._steps: dict[EncoderDecoder, CompiledSteps] = (
            dict(before._steps) if before and same else {}
        )
        try:
            first = self._architecture_of(store.tenants[0])
            self.expert_runner = (
                before.expert_runner if before and same else ExpertRunner(first.spec, computing.jit)
            )
            self.pool = DevicePool(
                store,
                first,
                layers,
                options.spare_slots,
                devices.by_slot,
                devices.everywhere,
                before.pool if before else None,
            )
            self.residuals = LoadedResiduals(
                store,
                slot_of,
                self._slots,
                devices.everywhere,
                isinstance(computing.products, NativeProducts),
                before.residuals if before else None,
            )
            self.ready = DeviceTenants(
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

    def shape(self, name: str) -> EncoderDecoder:
        """A tenant's shape."""
        return check_shape(self.store.config(name).shape, name)

    def _architecture_of(self, name: str) -> Architecture:
        shape = self.shape(name)
        key = computed_shape(shape)
        if key not in self._architectures:
            option = self._computing.options.expert_capacity
            capacity = shape.experts.router.capacity if option == "config" else option
            assert capacity is None or isinstance(capacity, int)
            products, dispatch = self._computing.products, self._computing.dispatch
            self._architectures[key] = Architecture.of(
                ModelSpec(shape, products, dispatch, self._slots, self._vocab_size, capacity)
            )
        return self._architectures[key]

    def steps(self, tenant: ReadyTenant) -> CompiledSteps:
        """The compiled computation for a tenant; tenants of one architecture share it."""
        key = computed_shape(tenant.architecture.spec.shape)
        if key not in self._steps:
            self._steps[key] = CompiledSteps(tenant.architecture, self._computing.jit)
        return self._steps[key]

    def _start_id(self, name: str) -> int:
        """The token that answers are decoded from. A tenant without a decision is refused by the
        engine."""
        try:
            found = self.store.generation(name).decoder_start_token_id
        except CheckpointError:
            found = None
        return self.shape(name).decoder_start_token_id if found is None else found

    def close(self) -> None:
        """Free the device."""
        self.pool.close()
        self.ready.close()
        self.residuals.close()
        self._steps.clear()
