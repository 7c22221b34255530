"""The sizes that arrays are rounded up to, so that few shapes are compiled."""

from __future__ import annotations

SMALLEST_PROMPT = 16
SMALLEST_CACHE = 32
SMALLEST_JOINT = 8


def power_of_two(n: int) -> int:
    """The smallest power of two from n on."""
    return 1 << (n - 1).bit_length()


def prompt_bucket(tokens: int) -> int:
    """16, 32, 48, 64, 96, 128, 192, 256, ...: powers of two and, from 32 on, one size half-way to
    the next."""
    whole = max(SMALLEST_PROMPT, power_of_two(tokens))
    half_way = whole * 3 // 4
    return half_way if whole >= 64 and tokens <= half_way else whole


def cache_bucket(tokens: int) -> int:
    """32, 64, 128, ..."""
    return max(SMALLEST_CACHE, power_of_two(tokens))


def joint_bucket(tokens: int) -> int:
    """Tokens of several sequences that go through a layer's experts together: 8, 16, 32, ..."""
    return max(SMALLEST_JOINT, power_of_two(tokens))
