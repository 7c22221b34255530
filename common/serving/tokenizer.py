"""A tokenizer as transformers loads it, and what it says of single tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from common.serving.detokenizer import CleanUp, IncrementalDecoder
from common.serving.grammar import Grammars

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
"""A directory that holds one of them has a tokenizer."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Loaded from a directory of its files: no network, no code of the checkpoint's."""

    def __init__(self, directory: Path):
        """Raises whatever transformers raises for damaged or unknown files."""
        # Imported here: it is slow, and brings the frameworks that transformers finds.
        from transformers import AutoTokenizer

        self._hf = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self._silent: dict[tuple[int, bool], bool] = {}
        self.encode("a")  # some files load and cannot be used

    @property
    def eos_token_id(self) -> int | None:
        found = self._hf.eos_token_id
        return found if isinstance(found, int) else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The template that `render` uses; None if there is none, or several of which none is the
        default."""
        try:
            return str(self._hf.get_chat_template()) if self._hf.chat_template else None
        except ValueError:
            return None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._hf(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole answer, cleaned up if the tokenizer's files ask for it."""
        return str(self._hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """A conversation in the chat template. options: transformers' `apply_chat_template`'s."""
        return str(self._hf.apply_chat_template(list(messages), tokenize=False, **options))

    def grammars(self, vocab_size: int, ends: Sequence[int]) -> Grammars:
        """For answers that have a structure, see `Grammars`. Raises RequestError."""
        return Grammars(self._hf, vocab_size, ends)

    # Answers in pieces.

    def incremental(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """Turns the tokens that follow `prompt` into text one at a time, without clean-up."""

        def decode(token_ids: Sequence[int]) -> str:
            return self._plain(token_ids, skip_special_tokens)

        return IncrementalDecoder(decode, lambda i: self._is_silent(i, skip_special_tokens), prompt)

    def clean_up(self) -> CleanUp | None:
        """What `decode` does to a finished text, for one that comes in pieces; None if it does
        nothing.

        transformers leaves the text of BPE tokenizers alone, whatever their files say
        (tokenization_utils_tokenizers.py, `_decode`).
        """
        if not getattr(self._hf, "clean_up_tokenization_spaces", False):
            return None
        forced = getattr(
            self._hf,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
            False,
        )
        if type(getattr(self._backend, "model", None)).__name__ == "BPE" and not forced:
            return None
        return CleanUp(self._hf.clean_up_tokenization)

    def _plain(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(
            self._hf.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def _is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether a token adds no text between two others: it is special, or not known to the
        tokenizer."""
        key = token_id, skip_special_tokens
        if key not in self._silent:
            word = self._word
            alone = self._plain([word, word], skip_special_tokens)
            self._silent[key] = self._plain([word, token_id, word], skip_special_tokens) == alone
        return self._silent[key]

    @cached_property
    def _word(self) -> int:
        """A token of letters."""
        return next((i for i in range(len(self._hf)) if self._plain([i], True).isalnum()), 0)

    # Single tokens.

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them; an id that it does not have is an empty text."""
        return [token or "" for token in self._hf.convert_ids_to_tokens(list(token_ids))]

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that need not hold whole characters; None for one that is text."""
        token = self._hf.convert_ids_to_tokens(token_id)
        if not isinstance(token, str) or token_id in self._hf.added_tokens_decoder:
            return None
        byte = _BYTE.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if self._is_byte_level and all(c in _byte_level_alphabet() for c in token):
            return bytes(_byte_level_alphabet()[c] for c in token)
        return None

    @property
    def _backend(self) -> Any:
        return getattr(self._hf, "backend_tokenizer", None)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = getattr(self._backend, "decoder", None)
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Those that answers' text leaves out: as they are written, and their ids."""
        named = dict(
            zip(map(str, self._hf.all_special_tokens), self._hf.all_special_ids, strict=True)
        )
        added = {
            str(token): i for i, token in self._hf.added_tokens_decoder.items() if token.special
        }
        return {token: i for token, i in (named | added).items() if token}


_ALPHABET: dict[str, int] = {}


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (openai/gpt-2, encoder.py,
    `bytes_to_unicode`)."""
    if not _ALPHABET:
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [b for b in range(256) if b not in shown]
        _ALPHABET.update(
            {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
        )
    return _ALPHABET
