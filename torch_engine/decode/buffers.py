"""What a decode step reads from the host, in one pinned buffer and one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIELDS = ("ids", "positions", "places", "tenants", "lengths")


def power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


class StepInputs:
    """Inputs of a step of at most `rows` rows, int32, at fixed places on the device.

    ids, positions, places, tenants, lengths: [rows]; a row of padding has tenant -1 and length 0.
    columns: [rows], the tenant of each group of adjacent rows; starts: [rows + 1], where it begins.
    blocks: [rows, width], the cache's blocks of each row.
    """

    def __init__(self, rows: int, width: int, device: torch.device):
        self.rows, self.width = rows, width
        sizes = dict.fromkeys(FIELDS, rows) | {"columns": rows, "starts": rows + 1}
        count = sum(sizes.values()) + rows * width
        self._host = torch.zeros(count, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(count, dtype=torch.int32, device=device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        on_host = self._host.numpy()
        self._fields: dict[str, np.ndarray] = {}
        self.on_device: dict[str, Tensor] = {}
        start = 0
        for name, size in (*sizes.items(), ("blocks", rows * width)):
            self._fields[name] = on_host[start : start + size]
            self.on_device[name] = self._device[start : start + size]
            start += size
        self._fields["blocks"] = self._fields["blocks"].reshape(rows, width)

    def send(
        self,
        columns: dict[str, Sequence[int]],
        groups: Sequence[tuple[int, int]],
        tables: Sequence[np.ndarray],
    ) -> None:
        """Fill and send the inputs of a step.

        columns: the fields of `FIELDS` but tenants. groups: (tenant, rows) of adjacent rows.
        tables: int64 [blocks], of each row.
        """
        if self._sent is not None:
            self._sent.synchronize()  # the last copy has left; it did before its tokens came
        count = len(tables)
        for name, values in columns.items():
            self._fields[name][:count] = values
            self._fields[name][count:] = 0
        tenants = [tenant for tenant, rows in groups for _ in range(rows)]
        self._fields["tenants"][:count] = tenants
        self._fields["tenants"][count:] = -1
        starts = np.cumsum([0, *(rows for _, rows in groups)])
        self._fields["columns"][: len(groups)] = [tenant for tenant, _ in groups]
        self._fields["starts"][: len(starts)] = starts
        self._fields["starts"][len(starts) :] = count
        for line, table in zip(self._fields["blocks"], tables, strict=False):
            line[: len(table)] = table
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Addresses:
    """Where tenants' weights lie: int64 [entries, tenants] on the device, a row for each name."""

    def __init__(self, names: Sequence[str], tenants: int, device: torch.device):
        self._host = torch.zeros(
            len(names), tenants, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self._device = torch.zeros(len(names), tenants, dtype=torch.int64, device=device)
        self._rows = {name: i for i, name in enumerate(names)}

    def row(self, name: str) -> Tensor:
        """int64 [tenants] on the device."""
        return self._device[self._rows[name]]

    def put(self, tenant: int, weights: dict[str, Tensor]) -> bool:
        """Take a tenant's addresses. Returns whether they are others than before."""
        new = torch.tensor([weights[name].data_ptr() for name in self._rows])
        if torch.equal(new, self._host[:, tenant]):
            return False
        self._host[:, tenant] = new
        return True

    def send(self) -> None:
        """Copy to the device, in the order of its stream."""
        self._device.copy_(self._host)
