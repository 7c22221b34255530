"""Our own CPU kernels for the JAX engine (kernels.cc): compiled once with the machine's C++
compiler, called from jitted code through XLA's foreign function interface, used where they prove
right.

XLA multiplies few rows at a fraction of the memory's rate. These kernels read weights packed in
blocks of 64 outputs, for decoding and for prompts alike, and a layer of experts is one call. They
are compiled for AVX-512 or AVX2 (common/native). Nothing depends on them: on another processor,
without Linux or a compiler, or with MOETEL_NATIVE=0 in the environment, `load` returns None and XLA
does all products.

Letters in shapes: T rows, K inputs, N outputs, B = ceil(N / 64) blocks of outputs, S slots, I
    intermediate size.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from common.native import HEADERS, Target, cpu_flags, find_target, one_process, switched_off
from common.plan.residual import (
    LOW_RANK,
    SIGN,
    Part,
    Residual,
    join_parts,
    matrices,
    pack_low_rank,
    pack_sign,
)
from jax_engine.experts.residuals import KINDS, part_on_device

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cc")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno")
BLOCK = 64  # outputs in a block of the packed layout

# Numbers of `Activation` in kernels.cc, by the names in Switch and T5 configs.
ACTIVATIONS = {"relu": 0, "gelu_new": 1, "gelu": 2, "silu": 3}

_loads = itertools.count()
_Array = TypeVar("_Array", np.ndarray, jax.Array)


def pack(weight: _Array) -> _Array:
    """Weights in the order in which the kernels read them: [..., N, K] -> [..., B, K, 64], zeros
    behind output N."""
    *stack, outputs, inputs = weight.shape
    blocks = -(-outputs // BLOCK)
    padding = [*[(0, 0)] * len(stack), (0, blocks * BLOCK - outputs), (0, 0)]
    if isinstance(weight, np.ndarray):
        padded = np.pad(weight, padding) if padding[-2][1] else weight
        return np.ascontiguousarray(padded.reshape(*stack, blocks, BLOCK, inputs).swapaxes(-1, -2))
    return jnp.pad(weight, padding).reshape(*stack, blocks, BLOCK, inputs).swapaxes(-1, -2)


def unpack(packed: _Array, out_features: int) -> _Array:
    """What was packed: [..., B, K, 64] -> [..., N, K]."""
    *stack, blocks, inputs, _ = packed.shape
    rows = packed.swapaxes(-1, -2).reshape(*stack, blocks * BLOCK, inputs)
    return rows[..., :out_features, :]


@dataclass(frozen=True)
class Kernels:
    """The kernels as functions for jitted code. Sums are float32; a row's bits depend on no other
    row.

    linear_target, experts_target, residuals_target: names under which XLA knows the handlers.
    threads: at most so many, or None for all that XLA's own pool has. target: the instructions that
        they use.
    """

    linear_target: str
    experts_target: str
    residuals_target: str
    target: str
    threads: int | None = None

    @staticmethod
    def pack(weight: _Array) -> _Array:
        """As the function `pack`."""
        return pack(weight)

    def linear(self, x: jax.Array, packed: jax.Array, out_features: int) -> jax.Array:
        """`x @ weight.T`: float32 [..., K] -> float32 [..., N].

        packed: float32 or bfloat16 [B, K, 64], from `pack`. out_features: N.
        """
        rows = _rows(x)
        if rows.shape[0] == 0 or out_features == 0:
            return jnp.zeros((*x.shape[:-1], out_features), jnp.float32)
        call: Any = jax.ffi.ffi_call(self.linear_target, _result(rows.shape[0], out_features))
        out: jax.Array = call(rows, packed, threads=np.int64(self.threads or 0))
        return out.reshape(*x.shape[:-1], out_features)

    def experts(
        self,
        x: jax.Array,
        slots: jax.Array,
        pool: Sequence[Sequence[jax.Array]],
        activation: str,
        *,
        intermediate_size: int,
        out_features: int | None = None,
        gated: bool = False,
        residuals: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """The feed-forward of each row's slot: float32 [..., K] -> float32 [..., N], zeros where it
        is not in 0..S-1.

        slots: int32 [...], as x without its last axis. pool: for each slot its packed projections,
            all float32 or all
        bfloat16: wi [B_I, K, 64], for gated ones a second, and wo [B_N, I, 64]. Ungated `act(x @
        wi.T) @ wo.T`, gated `(act(x @ wi_0.T) * (x @ wi_1.T)) @ wo.T`. intermediate_size: I.
        out_features: N, K if not given. Only slots that a row names are read.

        residuals: the words and the table of a `LayerResiduals`, laid out in
        blocks. The table is looked at when the call runs; a part that lies outside the words is an
        error then, which jax raises. If it has S rows for each of several tenants, `slots` are rows
        of it, and row v's weights are those of slot v mod S: they are read once for all tenants'
        rows.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is not supported, expected one of {sorted(ACTIVATIONS)}"
            )
        if slots.shape != x.shape[:-1]:
            raise ValueError(
                f"slots have shape {slots.shape}, x {x.shape}: expected one slot for each row of x"
            )
        projections = 3 if gated else 2
        for i, slot in enumerate(pool):
            if len(slot) != projections:
                raise ValueError(
                    f"slot {i} has {len(slot)} projections, expected {projections} with "
                    f"gated={gated}"
                )
        rows = _rows(x)
        out_features = rows.shape[1] if out_features is None else out_features
        if rows.shape[0] == 0 or out_features == 0:
            return jnp.zeros((*x.shape[:-1], out_features), jnp.float32)
        # The scratch is a result, so that XLA plans its memory with everything else's instead of a
        # call asking for it.
        width = -(-intermediate_size // BLOCK) * BLOCK
        results = (
            _result(rows.shape[0], out_features),
            _result(projections - 1, rows.shape[0], width),
        )
        target = self.experts_target if residuals is None else self.residuals_target
        out, _ = jax.ffi.ffi_call(target, results)(
            rows,
            slots.reshape(-1).astype(jnp.int32),
            *(residuals or ()),
            *(array for slot in pool for array in slot),
            threads=np.int64(self.threads or 0),
            activation=np.int64(ACTIVATIONS[activation]),
            gated=gated,
            intermediate_size=np.int64(intermediate_size),
        )
        return out.reshape(*x.shape[:-1], out_features)


def _rows(x: jax.Array) -> jax.Array:
    """float32 [..., K] -> [T, K]."""
    if x.dtype != jnp.float32:
        raise TypeError(f"x is {x.dtype}, the kernels take float32")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _result(*shape: int) -> Any:
    make: Any = jax.ShapeDtypeStruct  # not annotated in jax
    return make(shape, np.dtype(np.float32))


def _compile(target: Target) -> ctypes.CDLL:
    """Compile kernels.cc into the user's cache, or take what is there. Raises OSError or
    subprocess.SubprocessError."""
    compiler = next(
        (c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None
    )
    if compiler is None:
        raise OSError("no C++ compiler (g++ or c++) found")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    flags = (*FLAGS, *target.flags)
    sources = [path.read_bytes() for path in (SOURCE, *HEADERS)]
    key = repr((sources, flags, version, sorted(cpu_flags()), version_of("jaxlib")))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetel"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"jax-kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    with one_process(folder):
        if not _is_whole(path):
            _build(compiler, flags, path)
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)


def _build(compiler: str, flags: Sequence[str], path: Path) -> None:
    """Compile kernels.cc to `path`, with its hash behind it, in one step."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        library = Path(scratch) / path.name
        folders = ["-isystem", jax.ffi.include_dir(), "-I", str(HEADERS[0].parent)]
        command = [compiler, *flags, *folders, str(SOURCE), "-o", str(library)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(library, path)


def _is_whole(library: Path) -> bool:
    """Whether a library of ours is as it was written: its hash follows its content, where the
    loader does not look.

    Loading half a library can kill the process, so this comes first.
    """
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@cache
def load() -> Kernels | None:
    """The kernels, or None where they cannot be had; the reason is logged.

    Raises EngineError if the environment's MOETEL_NATIVE is malformed.
    """
    target = "they are switched off" if switched_off() else find_target()
    if isinstance(target, str):
        reason = target
    else:
        try:
            library = _compile(target)
            number = next(_loads)  # XLA refuses a name that it knows for another function
            names = ("moetel_linear", "moetel_experts", "moetel_experts_with_residuals")
            handlers = tuple(f"{name}_{number}" for name in names)
            capsule_of: Any = jax.ffi.pycapsule  # not annotated in jax
            for name, handler in zip(names, handlers, strict=True):
                jax.ffi.register_ffi_target(
                    handler, capsule_of(getattr(library, name)), platform="cpu"
                )
            kernels = Kernels(handlers[0], handlers[1], handlers[2], target.name)
            if _proves_right(kernels):
                return kernels
            reason = "a product differs from numpy's"
        except subprocess.CalledProcessError as error:
            output = (error.stderr or "").strip().splitlines()
            reason = f"{error}{': ' if output else ''}{output[0] if output else ''}"
        except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
            reason = str(error)
    logger.info("own CPU kernels are not used: %s", reason)
    return None


def _proves_right(kernels: Kernels) -> bool:
    """Whether products with packed weights, and with residuals beside them, equal numpy's."""
    rng = np.random.default_rng(0)
    x, wi, wo = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((9, 70), (100, 70), (70, 100))
    )
    slots = np.array([0, 1, -1] * 3, np.int32)
    hidden = x @ wi.T
    expected = np.where(slots[:, None] == 0, np.maximum(hidden, 0) @ wo.T, 0)
    words, table, more = _trial_residuals(rng, {"up": wi.shape, "down": wo.shape})
    corrected = np.where(
        slots[:, None] == 0, np.maximum(x @ (wi + more["up"]).T, 0) @ (wo + more["down"]).T, 0
    )
    # `load` may be called while something is traced; the trial is to run all the same, and on the
    # CPU.
    with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
        for dtype in (jnp.float32, jnp.bfloat16):
            first, second, last = (pack(jnp.asarray(w, dtype)) for w in (wi, wo, 0 * wo))
            found = np.asarray(kernels.linear(jnp.asarray(x), first, 100))
            pool = ((first, second), (first, last))
            layer, beside = (
                np.asarray(
                    kernels.experts(
                        jnp.asarray(x),
                        jnp.asarray(slots),
                        pool,
                        "relu",
                        intermediate_size=100,
                        residuals=None
                        if residuals is None
                        else (jnp.asarray(words), jnp.asarray(table)),
                    )
                )
                for residuals in (None, words)
            )
            tolerance = 1e-3 if dtype == jnp.float32 else 0.5
            if not (
                np.allclose(found, hidden, atol=tolerance)
                and np.allclose(layer, expected, atol=10 * tolerance)
                and np.allclose(beside, corrected, atol=10 * tolerance)
            ):
                return False
    return True


def _trial_residuals(
    rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Words, a table for two slots of which the first has residuals, and what these add to each
    projection."""
    parts, data = [], []
    for name, (outputs, inputs) in shapes.items():
        scale = rng.uniform(0.05, 0.1, -(-outputs // 3))
        data.append(pack_sign(scale, rng.random((outputs, inputs)) < 0.5, 3))
        v, u = (rng.integers(0, 16, (5, n)) for n in (inputs, outputs))
        data.append(pack_low_rank(np.full(5, 0.01, np.float32), v, u, 4))
        parts += [Part(name, SIGN, 1, 3), Part(name, LOW_RANK, 4, 5)]
    table = np.zeros((2, len(shapes), 2, 4), np.int32)
    pieces = [
        part_on_device(d, p, shapes[p.projection], blocked=True)
        for d, p in zip(data, parts, strict=True)
    ]
    for i, part in enumerate(parts):
        table[0, i // 2, i % 2] = (
            KINDS[part.kind],
            part.bits,
            part.size,
            sum(map(len, pieces[:i])) // 4,
        )
    residual = Residual(0, 0, 0, tuple(parts))
    return (
        np.concatenate(pieces).view(np.uint32),
        table,
        matrices(residual, join_parts(data), shapes),
    )
