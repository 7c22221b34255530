"""Our own CPU kernels for JAX: compiled once, rebuilt where damaged, refused where wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from common.kernels import build  # noqa: E402
from common.kernels import target as targets  # noqa: E402
from jax_engine import native  # noqa: E402
from tests.jax_engine.conftest import noise  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache of compiled kernels, and nothing loaded yet."""
    native.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    native.load.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the compiled kernels, to copy from: compiling takes seconds."""
    cache = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        native.load.cache_clear()
        patch.setenv("XDG_CACHE_HOME", str(cache))
        found = native.load()
        native.load.cache_clear()
    if found is None:
        pytest.skip("no kernels here")
    (library,) = (cache / "moetel").iterdir()
    assert library.suffix == ".so"
    return cache


@pytest.fixture
def filled(compiled: Path, fresh: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """As `fresh`, with the kernels in the cache."""
    shutil.copytree(compiled, tmp_path / "cache")
    return fresh


@pytest.mark.parametrize("lack", ["compiler", "broken compiler", "AVX2", "x86", "place", "leave"])
def test_without_kernels_load_says_why(
    lack: str, fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if lack == "compiler":
        fresh.setenv("PATH", str(tmp_path))
        fresh.delenv("CXX", raising=False)
    elif lack == "broken compiler":
        fresh.setenv("CXX", "false")
    elif lack == "AVX2":
        fresh.setattr(targets, "cpu_flags", lambda: frozenset({"avx"}))
    elif lack == "x86":
        fresh.setattr(targets.platform, "machine", lambda: "aarch64")
    elif lack == "leave":
        fresh.setenv(targets.SWITCH, "0")
    else:
        (tmp_path / "cache").write_text("not a folder")
    with caplog.at_level(logging.INFO, logger=native.__name__):
        assert native.load() is None
        assert native.load() is None
    (record,) = (r for r in caplog.records if r.name == native.__name__)
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("own CPU kernels are not used: ")


@pytest.mark.slow
def test_wrong_products_are_refused(
    filled: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled.setattr(
        native.Kernels,
        "linear",
        lambda self, x, packed, out_features: jnp.zeros((len(x), out_features)),
    )
    with caplog.at_level(logging.INFO, logger=native.__name__):
        assert native.load() is None
    assert "a product through XLA differs from numpy's" in caplog.text


@pytest.mark.slow
def test_compiled_once_and_kept(filled: pytest.MonkeyPatch) -> None:
    filled.setattr(build.subprocess, "run", _only_version(build.subprocess.run))
    assert native.load() is not None


def _only_version(run: Any) -> Any:
    def checked(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["--version"], f"compiled again: {command}"
        return run(command, **options)

    return checked


@pytest.mark.slow
def test_a_damaged_library_is_noticed(compiled: Path, tmp_path: Path) -> None:
    (library,) = (compiled / "moetel").iterdir()
    good, copy = library.read_bytes(), tmp_path / "copy.so"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    assert not build.is_whole(copy)
    for content in (
        b"",
        good[:20],
        good[: len(good) // 2],
        good[:-1],
        good + b"0",
        bytes(flipped),
        good,
    ):
        copy.write_bytes(content)
        assert build.is_whole(copy) == (content == good)


@pytest.mark.slow
def test_a_damaged_library_is_built_again(filled: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (library,) = (tmp_path / "cache" / "moetel").iterdir()
    half = library.read_bytes()[: library.stat().st_size // 2]
    library.write_bytes(half)
    again = native.load()
    assert again is not None
    assert build.is_whole(library)
    weight, x = noise(0, 70, 30), noise(1, 3, 30)
    found = again.linear(jnp.asarray(x), native.pack(jnp.asarray(weight)), 70)
    np.testing.assert_allclose(found, x @ weight.T, atol=1e-4)


@pytest.mark.slow
def test_loading_inside_a_traced_function(filled: pytest.MonkeyPatch) -> None:
    weight, x = noise(0, 70, 30), noise(1, 3, 30)

    @jax.jit
    def product(x: Any, packed: Any) -> Any:
        found = native.load()
        assert found is not None
        return found.linear(x, packed, 70)

    np.testing.assert_allclose(product(x, native.pack(weight)), x @ weight.T, atol=1e-4)
