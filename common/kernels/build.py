"""Compile the kernels for this machine, keep the result in the user's cache, and prove it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.kernels.library import Library, Threads
from common.kernels.proof import proves_right
from common.kernels.target import Target, cpu_flags, find_target

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno")


class Unavailable(Exception):
    """Why there are no kernels here."""


def load(
    binding: Path,
    flags: Sequence[str] = (),
    before: Callable[[], None] = lambda: None,
    threads: Callable[[ctypes.CDLL], Threads] = lambda library: Threads(),
) -> Library:
    """The kernels and an engine's binding, compiled into one library or taken from the cache.

    Args:
        binding: the engine's source.
        flags: for compiling it, beside those for the machine.
        before: called before the library is loaded.
        threads: the engine's threads, for trial products.

    Raises:
        Unavailable: they cannot be had.
        EngineError: the environment's MOETEL_NATIVE is malformed.
    """
    target = find_target()
    if isinstance(target, str):
        raise Unavailable(target)
    try:
        path = _compiled(target, binding, flags)
        before()
        functions = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        library = Library(functions, target.name)
        if not proves_right(library, threads(functions)):
            raise Unavailable("a product differs from numpy's")
    except subprocess.CalledProcessError as error:
        output = (error.stderr or "").strip().splitlines()
        raise Unavailable(
            f"{error}{': ' if output else ''}{output[0] if output else ''}"
        ) from error
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        raise Unavailable(str(error)) from error
    return library


def _compiled(target: Target, binding: Path, flags: Sequence[str]) -> Path:
    compiler = next(
        (c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None
    )
    if compiler is None:
        raise OSError("no C++ compiler (g++ or c++) found")
    version = _run([compiler, "--version"])
    sources = sorted(FOLDER.glob("*.cc"))
    contents = [p.read_bytes() for p in (*sources, *sorted(FOLDER.glob("*.h")), binding)]
    command = [compiler, *FLAGS, *target.flags, *flags, "-I", str(FOLDER)]
    key = repr((contents, command, version, sorted(cpu_flags())))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetel"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    with _one_process(folder):
        if not is_whole(path):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _run([*command, "-c", *map(str, sources), str(binding)], scratch)
                # Linked by itself, so that no flag brings a runtime of its own, such as OpenMP's.
                objects = [f"{source.stem}.o" for source in (*sources, binding)]
                _run([compiler, "-shared", *objects, "-o", path.name], scratch)
                library = Path(scratch) / path.name
                content = library.read_bytes()
                library.write_bytes(content + hashlib.sha256(content).digest())
                os.replace(library, path)
    return path


def _run(command: Sequence[str], folder: str | None = None) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, cwd=folder
    ).stdout


def is_whole(library: Path) -> bool:
    """Whether a library is as it was written: its hash follows its content, where the loader does
    not look.

    Loading half a library can kill the process, so this comes first.
    """
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Let one process at a time compile: the others wait, and find the library there."""
    import fcntl  # not on every system; kernels are for Linux

    directory = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
