"""Parameters of a random Switch Transformer by T5X's names, and a directory of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import switch


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    return switch.t5x_parameters(switch.arrays_of(switch.random_switch()))


@pytest.fixture
def checkpoint(parameters: dict[str, np.ndarray], tmp_path: Path) -> Path:
    return switch.write_t5x(tmp_path / "checkpoint_3", parameters)
