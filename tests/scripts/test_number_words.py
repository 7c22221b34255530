"""Tests of scripts/number_words.py: the task of the demo tenants and its split."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from scripts.demo.number_words import (
    ALL_LANGUAGES,
    LANGUAGES,
    NUMBERS,
    SMALLEST_HELD_OUT,
    expected,
    held_out,
    is_held_out,
    training_numbers,
)
from tests.helpers import REPOSITORY


def test_the_parts_cover_all_numbers_and_share_none() -> None:
    train, rest = training_numbers(), {n for n in NUMBERS if is_held_out(n)}
    assert rest.isdisjoint(train)
    assert len(train) + len(rest) == len(NUMBERS)
    assert 0.04 < len(rest) / len(NUMBERS) < 0.06


def test_small_numbers_are_all_trained_on() -> None:
    assert training_numbers()[:SMALLEST_HELD_OUT] == list(range(SMALLEST_HELD_OUT))


@pytest.mark.parametrize("part", [lambda n: n % 10, lambda n: n // 10 % 10, lambda n: n // 10_000])
def test_held_out_numbers_are_spread_over_digits(part: Callable[[int], int]) -> None:
    counts = Counter(part(n) for n in NUMBERS if is_held_out(n))
    even = sum(counts.values()) / 10
    assert len(counts) == 10
    assert all(abs(count - even) < 0.25 * even for count in counts.values())


def test_held_out_draws_without_repetition_from_the_held_out_part() -> None:
    found = held_out(600)
    assert len(set(found)) == 600
    assert all(is_held_out(n) for n in found)
    digits = Counter(len(str(n)) for n in found)
    assert digits[4] >= 200 and digits[5] >= 200 and digits[3] > 0


def test_held_out_depends_on_the_seed_alone() -> None:
    assert held_out(50, seed=1) == held_out(50, seed=1)
    assert held_out(50, seed=1) != held_out(50, seed=2)
    assert held_out(50) == held_out(200)[:50]


def test_the_split_is_the_same_in_another_process() -> None:
    """No hash that Python salts, no order of a set: the README's numbers must stay held out."""
    code = (
        "import sys; from scripts.demo.number_words import held_out; "
        "assert 'torch' not in sys.modules; sys.exit(repr(held_out(40)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert found.stderr.strip() == repr(held_out(40))


def test_held_out_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="held-out numbers"):
        held_out(len(NUMBERS))


@pytest.mark.parametrize(
    ("language", "number", "text"),
    [
        ("en", 1234, "one thousand, two hundred and thirty-four"),
        ("fr", 81, "quatre-vingt-un"),
        ("fr", 80_000, "quatre-vingt mille"),
        ("de", 35, "fünfunddreißig"),
        ("es", 22, "veintidós"),
        ("it", 28, "ventotto"),
        ("pt", 101, "cento e um"),
        ("nl", 23, "drieëntwintig"),
        ("sv", 31, "trettioett"),
        ("pl", 2000, "dwa tysiące"),
        ("tr", 90_005, "doksanbinbeş"),
    ],
)
def test_spelling(language: str, number: int, text: str) -> None:
    assert expected(number, language) == text


def test_languages_are_told_apart_by_their_words() -> None:
    """The base answers in any of them; a tenant's score must not count another's language."""
    for number in held_out(200):
        assert len({expected(number, lang) for lang in LANGUAGES}) == len(LANGUAGES)
        if number != 1000:  # "mille" in French and Italian, "mil" in Spanish and Portuguese
            assert len({expected(number, lang) for lang in ALL_LANGUAGES}) == len(ALL_LANGUAGES)


def test_the_shipped_languages_come_first() -> None:
    assert LANGUAGES == ("en", "fr", "de", "es") == ALL_LANGUAGES[:4]
    assert len(set(ALL_LANGUAGES)) == 10


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_every_language_spells_all_sizes_each_in_its_own_way(language: str) -> None:
    numbers = [*range(1000), *range(1000, len(NUMBERS), 97), NUMBERS[-1]]
    texts = [expected(n, language) for n in numbers]
    assert len(set(texts)) == len(numbers) and all(texts)
