"""The fake backend fails where its caller does not keep to the contract."""

from __future__ import annotations

import pytest

from common.serving.fake import FakeBackend
from tests.common.serving.requests import TENANTS


def test_the_fake_backend_keeps_its_callers_honest() -> None:
    backend = FakeBackend(TENANTS, room=8)
    with pytest.raises(AssertionError, match="empty"):
        backend.step([])
