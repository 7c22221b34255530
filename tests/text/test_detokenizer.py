"""Answers in pieces beside what transformers' tokenizers say of the whole, over five kinds of
tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.serving.detokenizer import CleanUp
from common.serving.tenant_text import TenantText
from common.serving.text_stream import TextStream
from tests.helpers import examples
from tests.text.kinds import CHARACTERS, KINDS

CLEANED = ("unigram_cleaned", "word_piece")


class Both:
    """A tokenizer of ours and transformers' own, of the same files."""

    def __init__(self, kind: str, path: Path):
        self.kind = kind
        self.text = TenantText(kind, KINDS[kind](path))
        self.hf: Any = AutoTokenizer.from_pretrained(path)
        self.size = len(self.hf)
        self.special = sorted(set(self.hf.all_special_ids))
        # Whole characters alone: of broken UTF-8 the decoders of byte tokens say something else
        # once more comes.
        self.characters = [
            [self.hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in c.encode()] for c in CHARACTERS
        ]

    def tokens(self, numbers: list[int]) -> list[int]:
        """Tokens for random numbers: ordinary, special and unknown ones."""
        ids: list[int] = []
        for number in numbers:
            token_id = number % (self.size + 3)
            name = self.hf.convert_ids_to_tokens(token_id) if token_id < self.size else ""
            if number % 11 == 0 and self.special:
                ids.append(self.special[number % len(self.special)])
            elif self.kind == "llama" and str(name).startswith("<0x"):
                ids += self.characters[number % len(self.characters)]
            else:
                ids.append(token_id)
        return ids

    def stream(self, ids: list[int], prompt: list[int] | None = None, **options: Any) -> list[str]:
        stream = TextStream(self.text, (), prompt or (), **options)
        return [stream.push(token_id, last=i == len(ids) - 1) for i, token_id in enumerate(ids)]


@pytest.fixture(scope="module", params=list(KINDS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(request.param, tmp_path_factory.mktemp(request.param))


NUMBERS = st.lists(st.integers(0, 10_000), min_size=1, max_size=40)


@settings(max_examples=examples(120), deadline=None)
@given(numbers=NUMBERS, skip=st.booleans())
def test_pieces_are_the_whole(both: Both, numbers: list[int], skip: bool) -> None:
    ids = both.tokens(numbers)
    assert "".join(both.stream(ids, skip_special_tokens=skip)) == both.hf.decode(
        ids, skip_special_tokens=skip
    )


@settings(max_examples=examples(120), deadline=None)
@given(prompt=NUMBERS, numbers=NUMBERS)
def test_prompt_and_answer_are_the_whole(both: Both, prompt: list[int], numbers: list[int]) -> None:
    """What a client expects who shows prompt + text; clean-up is left out, as it may reach into the
    prompt."""
    before, ids = both.tokens(prompt), both.tokens(numbers)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    known, whole = both.hf.decode(before, **options), both.hf.decode(before + ids, **options)
    assume(whole.startswith(known) and not known.endswith("\ufffd"))
    decoder = both.text.require("").incremental(before)
    pieces = [decoder.push(token_id, last=i == len(ids) - 1) for i, token_id in enumerate(ids)]
    assert "".join(pieces) == whole[len(known) :]


@settings(max_examples=examples(60), deadline=None)
@given(numbers=NUMBERS)
def test_a_look_ahead_is_what_the_token_then_adds(both: Both, numbers: list[int]) -> None:
    decoder = both.text.require("").incremental()
    for token_id in both.tokens(numbers):
        expected = decoder.peek(token_id)
        assert decoder.push(token_id) == expected


@settings(max_examples=examples(60), deadline=None)
@given(numbers=NUMBERS)
def test_bytes_of_tokens_are_the_text(both: Both, numbers: list[int]) -> None:
    if both.kind in CLEANED:
        pytest.skip("bytes of tokens know no clean-up")
    tokenizer = both.text.require("")
    decoder, found, text = tokenizer.incremental(), b"", ""
    for token_id in both.tokens(numbers):
        if both.kind == "byte_level" and (token_id >= both.size or token_id in both.special):
            continue
        piece = decoder.push(token_id)
        own = tokenizer.token_bytes(token_id) if token_id < both.size else None
        found += piece.encode() if own is None else own
        text += piece
    assert found.decode(errors="replace").startswith(text)


def test_a_space_survives_special_tokens(tmp_path: Path) -> None:
    """More special tokens than the context holds lie between two words."""
    both = Both("llama", tmp_path)
    word, end = both.hf.convert_tokens_to_ids("▁the"), both.hf.convert_tokens_to_ids("<|im_end|>")
    ids = [word, *[end] * 12, word]
    assert "".join(both.stream(ids)) == both.hf.decode(ids, skip_special_tokens=True) == "the the"


def test_a_prompt_that_ends_inside_a_character(tmp_path: Path) -> None:
    both = Both("llama", tmp_path)
    a, b, c = both.characters[1]
    decoder = both.text.require("").incremental([both.hf.convert_tokens_to_ids("▁the"), a, b])
    assert decoder.push(c) == CHARACTERS[1]


def test_bytes_that_never_become_a_character_do_not_hold_text_back(tmp_path: Path) -> None:
    both = Both("llama", tmp_path)
    lone = both.hf.convert_tokens_to_ids("<0xE6>")
    pieces = both.stream([lone] * 100)
    assert pieces.index("\ufffd" * 8) < 10


@settings(max_examples=examples(300), deadline=None)
@given(
    pieces=st.lists(st.text(alphabet=" .,?!'ntsmrveab", max_size=5), max_size=12),
)
def test_clean_up_of_pieces_is_that_of_the_whole(pieces: list[str], cleaner: Any) -> None:
    clean_up = CleanUp(cleaner)
    found = [clean_up.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert "".join(found) == cleaner("".join(pieces))


@pytest.fixture(scope="module")
def cleaner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' own."""
    return AutoTokenizer.from_pretrained(
        KINDS["word_piece"](tmp_path_factory.mktemp("cleaner"))
    ).clean_up_tokenization


def test_clean_up_holds_little_back(cleaner: Any) -> None:
    clean_up = CleanUp(cleaner)
    assert clean_up.push("plain words and") == "plain words and"
    assert [clean_up.push(piece) for piece in (" ", ".", " yes")] == ["", "", ". yes"]
    assert [clean_up.push(" '"), clean_up.push("s", last=True)] == ["", "'s"]
