"""How much longer a step takes with one more row, or one more tenant, learnt from the steps that
were taken.

On a device that waits for weights a row more costs next to nothing; on a processor of few cores it
costs everybody's next token time. A tenant more has a step read what that tenant has of its own:
little beside a Mixtral's experts, most of what a step of switch-base-8 reads. Nothing else knows
which of these a backend is, so the scheduler measures it.
"""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 256
"""Steps that are remembered: some seconds of a GPU, half a minute of a CPU, as loads and machines
change."""

FEWEST = 32
"""Below so many nothing is said."""

EVERY = 16
"""Steps after which the line is fitted anew (0.1 ms)."""

DOUBT = (0.05, 0.25, 0.25)
"""Variances of steps' tenants, rows and tokens read at which half of what they seem to cost is
believed."""

STALLS = 3.0
"""Times the median step that a step counts at most: compilers and neighbours on the machine stall
some."""


class StepTimes:
    """Seconds of a step as a line in its tenants, the rows that have a part and the tokens of
    prompts that are read: least squares over the last `WINDOW` steps.

    tenant_s, row_s, token_s: seconds that a tenant, a row and a token of a prompt add; 0 if that is
        not known.
    deviation: standard deviation of the steps' rows.

    `DOUBT` is added to what each of them varied by, so where it hardly did nothing is made out of
    noise.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, int, float]] = deque(maxlen=WINDOW)
        self._since = 0
        self._means = np.zeros(3)
        self._mean_s = 0.0
        self.tenant_s = self.row_s = self.token_s = 0.0
        self.deviation = 0.0

    def add(self, tenants: int, rows: int, read: int, seconds: float) -> None:
        """A step in which `rows` sequences of so many tenants had a part and `read` tokens of
        prompts were read."""
        self._steps.append((tenants, rows, read, seconds))
        self._since += 1
        if len(self._steps) >= FEWEST and self._since >= EVERY:
            self._since = 0
            self._fit()

    @property
    def empty_s(self) -> float:
        """Seconds of a step beside its tenants, rows and prompts."""
        return max(
            0.0, self._mean_s - float(self._means @ (self.tenant_s, self.row_s, self.token_s))
        )

    @property
    def read_per_row(self) -> float:
        """Tokens of prompts that steps read lately for each of their rows."""
        _, rows, read = self._means
        return float(read / rows) if rows else 0.0

    def seconds(self, tenants: float, rows: float, read: float = 0.0) -> float:
        """Of a step with so many tenants, rows and tokens of prompts; 0 if that is not known."""
        return self.empty_s + self.tenant_s * tenants + self.row_s * rows + self.token_s * read

    def _fit(self) -> None:
        steps = np.array(self._steps, dtype=np.float64)
        seconds = np.minimum(steps[:, 3], STALLS * np.median(steps[:, 3]))
        self._means, self._mean_s = steps[:, :3].mean(axis=0), float(seconds.mean())
        varied = steps[:, :3] - self._means
        self.deviation = float(steps[:, 1].std())
        products = varied.T @ varied + np.diag(DOUBT) * len(steps)
        found = np.linalg.solve(products, varied.T @ (seconds - self._mean_s))
        self.tenant_s, self.row_s, self.token_s = (max(0.0, float(value)) for value in found)
