"""Tokens into text, one token at a time, so that the pieces add up to what the tokenizer says of
the whole.

Two things make pieces differ from the whole. A token may hold a part of a character, or lose its
space at the start
of a text: so each token is decoded behind the tokens before it. And some tokenizers remove spaces
from a finished text (`clean_up_tokenization_spaces`): so text that may still change is held back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an unfinished character to."""

CONTEXT = 6
"""Tokens that a new one is decoded behind. One would do for joining words; a character has up to
four byte tokens."""

MAX_UNFINISHED = 8
"""Tokens after which an unfinished character is taken for bytes that never become one."""

Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """Text of a growing sequence of tokens, in whole characters.

    decode: the tokenizer's own, without clean-up. is_silent: whether a token adds no text wherever
        it stands, such as
    a special token that is left out. prompt: tokens before the first one; their text is not given
        out.
    """

    def __init__(
        self, decode: Decode, is_silent: Callable[[int], bool], prompt: Sequence[int] = ()
    ):
        self._decode, self._is_silent = decode, is_silent
        self._ids: list[int] = []
        self._read = 0
        self._known = ""
        self._prime(prompt)

    def _prime(self, prompt: Sequence[int]) -> None:
        """Keep the end of the prompt as context, from the beginning of a character on."""
        spoken: list[int] = []
        for token_id in reversed(prompt):
            if self._is_silent(token_id):
                continue
            spoken.insert(0, token_id)
            if len(spoken) >= CONTEXT and not self._decode(spoken).startswith(REPLACEMENT):
                break
            if len(spoken) >= CONTEXT + MAX_UNFINISHED:
                break
        # A prompt of token ids may end inside a character, which the answer then finishes.
        unfinished = 0
        while unfinished < min(4, len(spoken)):
            if not self._decode(spoken[: len(spoken) - unfinished]).endswith(REPLACEMENT):
                break
            unfinished += 1
        else:
            unfinished = 0
        self._ids = spoken
        self._read = len(spoken) - unfinished
        self._known = self._decode(spoken[: self._read]) if self._read else ""

    def _grown(self, token_id: int) -> str:
        return self._decode([*self._ids, token_id])

    def peek(self, token_id: int) -> str:
        """The text that this token would add now; an unfinished character is not added."""
        if self._is_silent(token_id):
            return ""
        grown = self._grown(token_id)
        return "" if grown.endswith(REPLACEMENT) else grown[len(self._known) :]

    @property
    def unfinished(self) -> str:
        """What is held back now, as the tokenizer writes a character that is not whole."""
        return self._decode(self._ids)[len(self._known) :] if self._read < len(self._ids) else ""

    def push(self, token_id: int, last: bool = False) -> str:
        """Take a token. Returns the text that is whole now. last: an unfinished character is given
        out as it is."""
        if self._is_silent(token_id):
            return self.finish() if last else ""
        grown = self._grown(token_id)
        self._ids.append(token_id)
        if (
            grown.endswith(REPLACEMENT)
            and not last
            and len(self._ids) - self._read < MAX_UNFINISHED
        ):
            return ""
        return self._take(grown)

    def finish(self) -> str:
        """What is still held back."""
        return self._take(self._decode(self._ids)) if self._read < len(self._ids) else ""

    def _take(self, grown: str) -> str:
        text = grown[len(self._known) :]
        self._read = len(self._ids)
        self._known = grown
        if len(self._ids) > 2 * CONTEXT and not grown.endswith(REPLACEMENT):
            # Begin the context at a character: decoders of byte tokens give up a run that begins
            # inside of one.
            for start in range(len(self._ids) - CONTEXT, max(0, len(self._ids) - CONTEXT - 4), -1):
                known = self._decode(self._ids[start:])
                if known and not known.startswith(REPLACEMENT):
                    del self._ids[:start]
                    self._read, self._known = len(self._ids), known
                    break
        return text


# transformers' clean-up replaces " .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've" and "
# 're", each by itself without its spaces (PreTrainedTokenizerBase.clean_up_tokenization). No
# replacement crosses a cut behind four characters without a space, nor one between a space and the
# beginning of a word that none of them has.
_CUT = re.compile(r"(?<=[^ ]{4})|(?<=[^ '] )(?=[^ .?!,'n])")


class CleanUp:
    """A tokenizer's `clean_up_tokenization` for a text that comes in pieces; gives out what can no
    longer change."""

    def __init__(self, clean: Callable[[str], str]):
        self._clean = clean
        self._pending = ""

    def push(self, piece: str, last: bool = False) -> str:
        """Take a piece. Returns cleaned text. last: nothing is held back."""
        self._pending += piece
        cut = len(self._pending)
        if not last:
            safe = max((m.end() for m in _CUT.finditer(self._pending)), default=0)
            # Every replacement begins with a space.
            cut = safe if " " in self._pending[safe:] else cut
        ready, self._pending = self._pending[:cut], self._pending[cut:]
        return self._clean(ready)
