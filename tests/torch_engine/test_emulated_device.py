"""Tests marked `gpu` on an emulated CUDA device, which finds races and mixed devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import shared_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a process that runs many tests
    pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here: they run on it"),
]


def test_no_races() -> None:
    emulation = shared_path("cuda")
    # Its pretended CUDA runs torch's operations, and none of Triton's.
    environment = {**os.environ, "PYTHONPATH": f"{emulation}:.", "TRITON_INTERPRET": "0"}
    arguments = ["-m", "pytest", "-q", "-s", "-p", "plugin", "-m", "gpu", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, *arguments, "tests/torch_engine"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    looks = re.findall(r"races:\n((?:  .*\n)*)", run.stdout)
    assert len(looks) > 10, run.stdout[-3000:]
    assert not any(looks), looks
