"""Compile all of the engine's Triton kernels for a card that is not here.

python -m tests.torch_engine.decode.compile_ahead FOLDER CAPABILITY writes a cubin a case.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from torch_engine.decode.kernels import attention, routing, rows
from torch_engine.decode.kernels.linear import linear
from torch_engine.decode.launches import tile
from torch_engine.experts.grouped_residuals import EXPAND, SHRINK
from torch_engine.experts.residual_kernels import expand, shrink, tile_rows

MODULES = (
    *(f"torch_engine.decode.kernels.{n}" for n in ("attention", "linear", "routing", "rows")),
    "torch_engine.experts.residual_kernels",
)
TYPES = {
    "b": "*bf16",
    "f": "*fp32",
    "i": "*i32",
    "l": "*i64",
    "u": "*u8",
    "I": "i32",
    "F": "fp32",
}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched.

    types: a letter of `TYPES` for each argument that is no constant. scalars: those that are
    multiples of 16, as pointers are. copies: the instruction that loads must be made of.
    """

    kernel: Any
    types: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    scalars: str = ""
    copies: str = ""

    def cubin(self, capability: int) -> bytes:
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        types = dict(zip(names, (TYPES[t] for t in self.types), strict=True))
        aligned = [n for n in names if types[n].startswith("*") or n in self.scalars.split()]
        source = ASTSource(
            fn=self.kernel,
            signature=types | dict.fromkeys(self.constants, "constexpr"),
            constexprs=self.constants,
            attrs={(self.kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert self.copies in made.asm["ptx"], f"{self.copies} was not found"
        found = made.asm["cubin"]
        assert isinstance(found, bytes)
        return found


AT_ONCE = "cp.async.cg"  # 16 bytes, while others are multiplied


def _cut(cut: dict[str, int], **constants: Any) -> dict[str, Any]:
    """Of a launch's cut: constants, warps and stages."""
    numbers = {name: value for name, value in cut.items() if not name.startswith("num_")}
    found: dict[str, Any] = {"constants": constants | numbers, "warps": cut["num_warps"]}
    return found | {"stages": cut["num_stages"]}


def cases() -> list[Case]:
    found = []
    for share, gated, by_slot, outputs in ((1, False, False, 4096), (8, True, True, 0)):
        same = {"SHARE": share, "SORTED": by_slot, "GATED": gated, "EXACT": False}
        cut = _cut(tile(outputs, by_slot, False), BM=16 if by_slot else 32, **same)
        found.append(Case(linear, "bbliiiII", **cut, scalars="N K", copies=AT_ONCE))
    cut = _cut(tile(0, True, False), SHARE=1, SORTED=True, GATED=False, EXACT=False, BM=16)
    found.append(Case(linear, "bbliiiII", **cut, scalars="N K", copies=AT_ONCE))
    heads = {"HEADS": 32, "KV_HEADS": 4, "D": 128}
    for norm, warps in ((0, 1), (1, 1), (2, 4)):
        constants = heads | {"NORM": norm, "CLIP": True, "HALF": 64, "WHOLE": 4096}
        found.append(
            Case(attention.rotate_and_keep, "bbbbiiillllFFI", constants, warps, scalars="stride")
        )
    constants = {"KV_HEADS": 4, "SHARED": 8, "D": 128, "DP": 128, "BLOCK": 16, "SPLITS": 8}
    constants |= {"WINDOW": 0, "EXACT": False, "RP": 16, "BK": 64}
    found.append(Case(attention.attend, "bbbiiffFII", constants, scalars="stride", copies=AT_ONCE))
    constants = {"HEADS": 32, "D": 128, "DP": 128, "SPLITS": 8}
    found.append(Case(attention.merge, "ffib", constants, 1))
    constants = {"TOP": 8, "RENORMALISE": True, "ROUND": True, "TOP_BLOCK": 8, "BLOCK": 128}
    found.append(Case(routing.pick, "billifiI", constants, 1))
    constants = {"BLOCK": 512, "SLOTS_BLOCK": 1024, "STEP": 8}
    found.append(Case(routing.sort, "iiiiII", constants, 8))
    found.append(Case(rows.embed, "iilbFI", {"BLOCK": 4096}, 8, scalars="H"))
    for top in (0, 1, 8):
        constants = {"TOP": top, "BLOCK": 4096}
        found.append(Case(rows.add_norm, "bbfilbFFI", constants, 8, scalars="H"))
    found.append(Case(rows.activate, "bbI", {"BLOCK": 1024}, scalars="N"))
    for ordered in (False, True):
        constants = {"ORDERED": ordered, "BM": 64, "BLOCK": 1024}
        found.append(Case(tile_rows, "iiiiI" if ordered else "liiiI", constants))
        same = {"ORDERED": ordered, "EXACT": False}
        for most in EXPAND:
            cut = _cut(SHRINK[most], BM=most, **same)
            found.append(Case(shrink, "buliifIIIIIII", **cut, scalars="K", copies="cp.async.c"))
            cut = _cut(EXPAND[most], BM=most, **same)
            found.append(Case(expand, "bbuliifIIIIIII", **cut, scalars="N K", copies=AT_ONCE))
    return found


def launched() -> set[str]:
    """Names of all kernels that there are."""
    return {
        name
        for module in map(importlib.import_module, MODULES)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and not name.startswith("_") and name != "weights_of"
    }


if __name__ == "__main__":
    made = cases()
    missing = launched() - {case.kernel.__name__ for case in made}
    assert not missing, f"no case of {missing}"
    for number, case in enumerate(made):
        path = Path(sys.argv[1]) / f"{number}-{case.kernel.__name__}.cubin"
        path.write_bytes(case.cubin(int(sys.argv[2])))
