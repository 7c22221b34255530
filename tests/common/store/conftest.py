"""A store of three tenants with five copies, by the paper's rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import (
    Store,
)
from tests.common.conftest import Family
from tests.helpers import build_round_robin


@pytest.fixture
def store(family: Family, tmp_path: Path) -> Store:
    return build_round_robin(tmp_path / "store", family.paths, slots=5)
