"""An answer's text as its tokens come: whole characters, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from common.serving.tenant_text import TenantText


class TextStream:
    """Turns tokens into pieces of text. Their concatenation is the whole answer, cut before the
    first stop string.

    A piece is held back while it ends in an unfinished character, or in what may become a stop
    string.
    """

    def __init__(
        self,
        text: TenantText,
        stop: Sequence[str],
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ):
        """prompt: what the answer goes on from. include_stop: the answer keeps the stop string that
        ends it."""
        tokenizer = text.require("it has no text")
        self._decoder = tokenizer.incremental(prompt, skip_special_tokens)
        self._clean_up = tokenizer.clean_up()
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._pending = ""
        self.emitted = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stopped_by is not None

    def push(self, token_id: int, last: bool = False) -> str:
        """Take one more token; returns the text that is now certain. `last` releases everything
        held back."""
        return self._add(self._decoder.push(token_id, last), last)

    def finish(self) -> str:
        """What is still held back, at the end of an answer that ended otherwise than by
        `push(last=True)`."""
        return self._add(self._decoder.finish(), last=True)

    def _add(self, piece: str, last: bool) -> str:
        if self._clean_up is not None:
            piece = self._clean_up.push(piece, last)
        self._pending += piece
        return self._release(last)

    def _release(self, last: bool) -> str:
        if self.stopped:
            return ""
        found = [(i, s) for i, s in ((self._pending.find(s), s) for s in self._stop) if i >= 0]
        if found:
            first, self.stopped_by = min(found)
            piece = self._pending[: first + (len(self.stopped_by) if self._include_stop else 0)]
        elif last:
            piece = self._pending
        else:
            piece = self._pending[: len(self._pending) - self._held()]
        self._pending = self._pending[len(piece) :]
        self.emitted += piece
        return piece

    def _held(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:size]):
                    longest = size
                    break
        return longest
