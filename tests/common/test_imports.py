"""What importing brings along: the core neither framework, an engine only its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import helpers


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("common", ("torch", "jax", "transformers")),
        ("common.engine, common.store, common.text, common.similarity", ("torch", "jax")),
        ("torch_engine", ("jax", "flax")),
        ("torch_engine.backend", ("jax", "flax")),
        ("jax_engine", ("torch",)),
        ("scripts.cli, scripts.build, scripts.inspect", ("torch", "jax")),
    ],
)
def test_imports_stay_apart(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=helpers.REPOSITORY
    )
    assert out.stdout.strip() == "[]"
