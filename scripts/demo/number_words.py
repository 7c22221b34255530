"""The demo tenants' task: spelling whole numbers out in a language. Texts come from the `num2words`
package.

Numbers are split once and for all into those that training may show and those held out for scores.
"""

from __future__ import annotations

import random
import zlib
from functools import lru_cache

LANGUAGES = ("en", "fr", "de", "es")  # those of the tenants in examples/

# For experiments with more tenants; the four above come first.
ALL_LANGUAGES = (*LANGUAGES, "it", "pt", "nl", "sv", "pl", "tr")

NUMBERS = range(100_000)

# Below this every number may be trained on: they are the words that larger numbers are made of.
SMALLEST_HELD_OUT = 100
HELD_OUT_SHARE = 20  # one number in twenty


@lru_cache(maxsize=1 << 20)
def expected(number: int, language: str) -> str:
    """The number in words, as num2words spells it. language: one of `ALL_LANGUAGES`."""
    from num2words import num2words

    return str(num2words(number, lang=language))


def is_held_out(number: int) -> bool:
    """Whether a number belongs to the held-out part: a fixed pseudo-random twentieth of those from
    100 on."""
    return (
        number >= SMALLEST_HELD_OUT
        and zlib.crc32(f"held out? {number}".encode()) % HELD_OUT_SHARE == 0
    )


def training_numbers() -> list[int]:
    """Every number that training may show, ascending."""
    return [n for n in NUMBERS if not is_held_out(n)]


def held_out(count: int, seed: int = 0) -> list[int]:
    """`count` different held-out numbers, with three, four and five digits in turn as long as there
    are any."""
    rng = random.Random(seed)
    by_digits: dict[int, list[int]] = {}
    for n in NUMBERS:
        if is_held_out(n):
            by_digits.setdefault(len(str(n)), []).append(n)
    for numbers in by_digits.values():
        rng.shuffle(numbers)
    found: list[int] = []
    while len(found) < count and by_digits:
        for digits in sorted(by_digits):
            if len(found) < count:
                found.append(by_digits[digits].pop())
            if not by_digits[digits]:
                del by_digits[digits]
    if len(found) < count:
        raise ValueError(f"there are only {len(found)} held-out numbers, {count} were asked for")
    return found
