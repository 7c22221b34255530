"""Triton's kernels run in its interpreter where there is no card."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when kernels are defined, which no other test does before.
    os.environ["TRITON_INTERPRET"] = "1"
