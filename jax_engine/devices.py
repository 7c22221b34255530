"""The device or the mesh that an engine computes on, and where arrays lie on it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from common.errors import EngineError
from jax_engine.options import JaxOptions
from jax_engine.steps.buckets import power_of_two

Array = jax.Array


class Devices:
    """One device, or a mesh with the axes `data` and `expert`."""

    def __init__(self, options: JaxOptions):
        """Raises EngineError."""
        found = _find(options)
        self.platform = found[0].platform
        self.is_mesh = options.mesh is not None or self.platform != "cpu"
        self.mesh = Mesh(np.array(found).reshape(tuple(options.mesh or (1, 1))), ("data", "expert"))
        self._everywhere = self._sharding(None)
        self._by_slot = self._sharding("expert")
        self._by_row = self._sharding("data")

    def _sharding(self, axis: str | None) -> Sharding:
        """Along an axis of the mesh. On one device always the same one: jax compiles anew for
        another, equal or not."""
        if self.mesh.size == 1:
            return SingleDeviceSharding(self.mesh.devices.flat[0])
        return NamedSharding(self.mesh, PartitionSpec() if axis is None else PartitionSpec(axis))

    def everywhere(self, array: Any) -> Array:
        """The whole array on every device."""
        placed: Array = jax.device_put(array, self._everywhere)
        return placed

    def by_slot(self, array: Any) -> Array:
        """Stacked slots along the axis of experts; arrays of single slots where they are all on one
        device."""
        placed: Array = jax.device_put(array, self._by_slot)
        return placed

    def by_row(self, array: Any) -> Array:
        """Rows along the axis of data."""
        placed: Array = jax.device_put(array, self._by_row)
        return placed

    def rows_given(self, array: np.ndarray) -> Any:
        """The same for small arrays that a call is given from the host: one device takes them as
        they are."""
        return array if self.mesh.size == 1 else self.by_row(array)

    def rows(self, count: int) -> int:
        """Rows of arrays that hold so many: a power of two, and a multiple of the axis of data."""
        data = int(self.mesh.shape["data"])
        return -(-power_of_two(count) // data) * data

    def slots(self, count: int) -> int:
        """Slots of stacked arrays that hold so many: every device of the axis has as many."""
        experts = int(self.mesh.shape["expert"])
        return max(1, -(-count // experts)) * experts if self.is_mesh else count

    @property
    def name(self) -> str:
        return self.platform if self.mesh.size == 1 else f"{self.platform} x {self.mesh.size}"

    @property
    def free_bytes(self) -> int:
        """Memory that is free: the first accelerator's, or the machine's."""
        device = self.mesh.devices.flat[0]
        stats = device.memory_stats() if self.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024


def _find(options: JaxOptions) -> list[jax.Device]:
    """One device, or those of the mesh."""
    kind = {"auto": None, "cuda": "gpu"}.get(options.device, options.device)
    try:
        found = jax.devices(kind)
    except RuntimeError as error:
        raise EngineError(
            f"device {options.device!r} is not there ({error}); use auto or cpu"
        ) from error
    wanted = 1 if options.mesh is None else options.mesh[0] * options.mesh[1]
    if wanted > len(found):
        raise EngineError(
            f"mesh {tuple(options.mesh or ())} needs {wanted} devices, jax sees {len(found)}"
        )
    return list(found[:wanted])
