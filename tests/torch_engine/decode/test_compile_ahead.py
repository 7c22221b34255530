"""Kernels of decode steps compile for cards that are not here, without spilling registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

MOST_REGISTERS = 168  # of 255; three programs of four warps a multiprocessor at the least

SCRIPT = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torch_engine.decode.kernels.attention import attend
from torch_engine.decode.kernels.linear import linear

BF, I32 = "*bf16", "*i32"
LINEAR = dict(x=BF, out=BF, table="*i64", columns=I32, order=I32, starts=I32, N="i32", K="i32")
ATTEND = dict(q=BF, keys=BF, values=BF, blocks=I32, lengths=I32, parts="*fp32", weights="*fp32",
              scale="fp32", stride="i32", blocks_stride="i32")
EXPERTS = dict(SORTED=True, EXACT=False, BM=16, BN=32, BK=128)
CASES = [
    (linear, LINEAR, dict(SHARE=1, SORTED=False, GATED=False, EXACT=False, BM=32, BN=16, BK=128),
     "x out N K", 2, 6),
    (linear, LINEAR, dict(SHARE=8, GATED=True, **EXPERTS), "x out N K", 4, 4),
    (linear, LINEAR, dict(SHARE=1, GATED=False, **EXPERTS), "x out N K", 4, 4),
    (attend, ATTEND, dict(KV_HEADS=4, SHARED=8, D=128, DP=128, BLOCK=16, SPLITS=8, WINDOW=0,
                          EXACT=False, RP=16, BK=64), "q keys values stride", 4, 3),
]
out, capability = sys.argv[1], int(sys.argv[2])
for i, (kernel, types, constants, aligned, warps, stages) in enumerate(CASES):
    signature = types | {name: "constexpr" for name in constants}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned.split()
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=warps, num_stages=stages),
    )
    open(f"{out}/{i}.cubin", "wb").write(made.asm["cubin"])
    assert "cp.async.cg" in made.asm["ptx"], "loads of 16 bytes were not found"
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills(capability: int, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path), str(capability)]
    # Apart from this process, whose kernels are interpreted.
    run = subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = sorted(tmp_path.glob("*.cubin"))
    assert len(found) == 4
    for cubin in found:
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, usage
        assert numbers["REG"] <= MOST_REGISTERS, usage
