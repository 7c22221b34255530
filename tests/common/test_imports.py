"""What importing brings along: the core neither framework, an engine only its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import helpers
from tests.common.conftest import ABSENT


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("common", ("torch", "jax", "transformers")),
        (
            "common.serving.engine, common.store, common.serving.tenant_text, common.plan.distance",
            ("torch", "jax"),
        ),
        ("torch_engine", ("jax", "flax")),
        ("torch_engine.backend", ("jax", "flax")),
        ("jax_engine", ("torch",)),
        ("scripts.cli, scripts.commands.build, scripts.commands.inspect_store", ("torch", "jax")),
    ],
)
def test_imports_stay_apart(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=helpers.REPOSITORY,
    )
    assert out.stdout.strip() == "[]"


def test_collecting_tests_of_common_imports_no_framework() -> None:
    """What they import as they run is refused by `no_frameworks`."""
    code = f"""
import sys, pytest
for name in {ABSENT!r}:
    sys.modules[name] = None
sys.exit(pytest.main(["tests/common", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider"]))
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, cwd=helpers.REPOSITORY)
    assert out.returncode == 0, out.stdout[-3000:]
