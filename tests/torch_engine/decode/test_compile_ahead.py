"""All Triton kernels compile for cards that are not here, without spilling registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

# Of 255; with 168, three programs of four warps a multiprocessor at the least. On sm_80 the
# operands of products of 64 rows are in registers.
MOST_REGISTERS = {80: 200, 90: 168, 100: 168}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills(capability: int, tmp_path: Path) -> None:
    script = "tests.torch_engine.decode.compile_ahead"
    # Apart from this process, whose kernels are interpreted.
    run = subprocess.run(
        [sys.executable, "-m", script, str(tmp_path), str(capability)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = sorted(tmp_path.glob("*.cubin"))
    assert len(found) > 20
    for cubin in found:
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, (cubin.name, usage)
        assert numbers["REG"] <= MOST_REGISTERS[capability], (cubin.name, usage)
