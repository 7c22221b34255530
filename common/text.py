"""Text in and out: a tenant's tokenizer, and text that appears token by token.

No character is split on the way, and no stop string missed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import RequestError, StoreError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

# What a tokenizer decodes an unfinished multi-byte character to.
REPLACEMENT = "\ufffd"


class TenantText:
    """A tenant's tokenizer and generation config, loaded from its assets; no network, no code of the checkpoint's."""

    def __init__(self, tenant: str, assets: Path):
        self.tenant = tenant
        self.assets = assets
        self._tokenizer: Any = None
        if any((assets / name).is_file() for name in TOKENIZER_FILES):
            # Imported here: it is slow, and brings the frameworks that transformers finds.
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(assets, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # the library raises many kinds for damaged files
                raise StoreError(
                    f"{assets}: the tokenizer of tenant {tenant!r} cannot be loaded ({error}); "
                    "mend the checkpoint's tokenizer files and build again"
                ) from error
        self.eos_token_ids = self._eos_token_ids()

    def _eos_token_ids(self) -> frozenset[int]:
        """From generation_config.json; without it from config.json, as transformers' generate() does."""
        for name in ("generation_config.json", "config.json"):
            path = self.assets / name
            if not path.is_file():
                continue
            try:
                value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise StoreError(
                    f"{path}: of tenant {self.tenant!r}, cannot be read as a JSON object ({error}); "
                    "mend the checkpoint's file and build again"
                ) from error
            if value is not None:
                return frozenset([value] if isinstance(value, int) else value)
        return frozenset()

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        """Token ids with the tokenizer's special tokens. Raises RequestError if the tenant has no tokenizer."""
        if self._tokenizer is None:
            raise RequestError(f"tenant {self.tenant!r} has no tokenizer; give the prompt as a list of token ids")
        return list(self._tokenizer(text)["input_ids"])

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer: no special tokens but, at its end, the end-of-sequence one if there is one."""
        if self._tokenizer is None:
            raise RequestError(f"tenant {self.tenant!r} has no tokenizer; give the answer as a list of token ids")
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, min(self.eos_token_ids)] if self.eos_token_ids else ids

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """Text without special tokens, None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the tenant's chat template, ready for the assistant's turn."""
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise RequestError(f"tenant {self.tenant!r} has no chat template; give the prompt as plain text")
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class TextStream:
    """Turns tokens into pieces of text. Their concatenation is the whole answer, cut before the first stop string.

    A piece is held back while it ends in an unfinished character, or in what may become a stop string.
    """

    # Tokens decoded before the unread ones, so that a tokenizer which joins words by their neighbours sees them: at
    # least so many, from the end of a character on. A byte-fallback decoder turns a whole run of bytes into
    # replacements if the run begins inside a character.
    CONTEXT = 6

    def __init__(self, text: TenantText, stop: Sequence[str]):
        self._text = text
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._read = 0
        self._edges = deque([0])  # numbers of tokens that end with a whole character, those still of use as context
        self._pending = ""
        self.emitted = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stopped_by is not None

    def push(self, token_id: int, last: bool = False) -> str:
        """Take one more token; returns the text that is now certain. `last` releases everything held back."""
        self._ids.append(token_id)
        self._decode(last)
        return self._release(last)

    def finish(self) -> str:
        """What is still held back, at the end of an answer that ended otherwise than by `push(last=True)`."""
        self._decode(last=True)
        return self._release(last=True)

    def _decode(self, last: bool) -> None:
        """Move what the unread tokens say to the pending text, unless they end inside a character."""
        while len(self._edges) > 1 and self._edges[1] <= self._read - self.CONTEXT:
            self._edges.popleft()
        start = self._edges[0]
        known = self._text.decode(self._ids[start : self._read]) or ""
        grown = self._text.decode(self._ids[start:]) or ""
        if last or not grown.endswith(REPLACEMENT):
            self._pending += grown[len(known) :]
            self._read = len(self._ids)
            self._edges.append(self._read)

    def _release(self, last: bool) -> str:
        if self.stopped:
            return ""
        found = [(i, s) for i, s in ((self._pending.find(s), s) for s in self._stop) if i >= 0]
        if found:
            first, self.stopped_by = min(found)
            piece = self._pending[:first]
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
