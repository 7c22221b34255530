"""The order of launches, where a launch may begin before the last one has ended."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def after_the_last(EARLY: tl.constexpr):
    """Wait for what the last launch wrote, and let the next one begin to be set up.

    EARLY: the launch is a programmatic dependent one (sm_90 and later); else there is nothing to
    wait for.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
