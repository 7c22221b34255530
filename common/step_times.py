"""How much longer a step takes with one more row, learnt from the steps that were taken.

On a device that waits for weights a row more costs next to nothing; on a processor of few cores it costs everybody's
next token time. Nothing else knows which of the two a backend is, so the scheduler measures it.
"""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 256
"""Steps that are remembered: some seconds of a GPU, half a minute of a CPU, as loads and machines change."""

FEWEST = 32
"""Below so many nothing is said."""

EVERY = 16
"""Steps after which the line is fitted anew (0.1 ms)."""

STALLS = 3.0
"""Times the median step that a step counts at most: compilers and neighbours on the machine stall some."""


class StepTimes:
    """Seconds of a step as a line in the rows that have a part and the tokens of prompts that are read: least squares
    over the last `WINDOW` steps.

    row_s, token_s: seconds that a row, and a token of a prompt, add; 0 if that is not known.
    deviation: standard deviation of the steps' rows.

    Half a row's variation is added to what the rows varied by, so where they hardly did nothing is made out of noise.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=WINDOW)
        self._since = 0
        self._mean_rows = self._mean_read = self._mean_s = 0.0
        self.row_s = self.token_s = 0.0
        self.deviation = 0.0

    def add(self, rows: int, read: int, seconds: float) -> None:
        """A step in which `rows` sequences had a part and `read` tokens of prompts were read."""
        self._steps.append((rows, read, seconds))
        self._since += 1
        if len(self._steps) >= FEWEST and self._since >= EVERY:
            self._since = 0
            self._fit()

    @property
    def empty_s(self) -> float:
        """Seconds of a step beside its rows and prompts."""
        return max(0.0, self._mean_s - self._mean_rows * self.row_s - self._mean_read * self.token_s)

    @property
    def read_per_row(self) -> float:
        """Tokens of prompts that steps read lately for each of their rows."""
        return self._mean_read / self._mean_rows if self._mean_rows else 0.0

    def seconds(self, rows: float, read: float = 0.0) -> float:
        """Of a step with so many rows and tokens of prompts; 0 if that is not known."""
        return self.empty_s + self.row_s * rows + self.token_s * read

    def _fit(self) -> None:
        steps = np.array(self._steps, dtype=np.float64)
        seconds = np.minimum(steps[:, 2], STALLS * np.median(steps[:, 2]))
        means = steps[:, :2].mean(axis=0)
        varied = steps[:, :2] - means
        self.deviation = float(steps[:, 0].std())
        products = varied.T @ varied + np.diag([0.25, 0.25]) * len(steps)
        found = np.linalg.solve(products, varied.T @ (seconds - seconds.mean()))
        self._mean_rows, self._mean_read = (float(mean) for mean in means)
        self._mean_s = float(seconds.mean())
        self.row_s, self.token_s = (max(0.0, float(value)) for value in found)
