"""Text in and out for one tenant: prompts, conversations, and answers that appear token by
token."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoints.generation_config import GenerationConfig
from common.errors import RequestError, StoreError, TenantUnavailableError
from common.serving.grammar import Grammar, Grammars
from common.serving.tokenizer import FILES, Tokenizer
from common.structured_outputs import StructuredOutputs

_PROBE = ({"role": "user", "content": "Hello"},)


class TenantText:
    """A tenant's tokenizer and what it decided about generation.

    failure: why the tokenizer cannot be loaded; None if it can, or if there is none. Prompts of
    token ids do not need it.
    """

    def __init__(self, tenant: str, assets: Path, generation: GenerationConfig | None = None):
        """assets: a directory with the tokenizer's files. Damaged ones raise nothing here: see
        `check`."""
        self.tenant = tenant
        self.assets = assets
        self.generation = generation or GenerationConfig()
        self._lock = threading.Lock()
        self._grammars: Grammars | None = None
        self.failure: str | None = None
        self.tokenizer: Tokenizer | None = None
        if any((assets / name).is_file() for name in FILES):
            try:
                self.tokenizer = Tokenizer(assets)
            except Exception as error:  # the library raises many kinds for damaged files
                what = " ".join(str(error).split())[:300] or type(error).__name__
                lacking = (
                    isinstance(error, ImportError) or "pip install" in what or "installed" in what
                )
                mend = (
                    "install what it names" if lacking else "mend the checkpoint's tokenizer files"
                )
                self.failure = (
                    f"{assets}: the tokenizer of tenant {tenant!r} cannot be loaded ({what}); "
                    f"{mend} and build again"
                )

    def check(self) -> None:
        """Raises StoreError if the tokenizer cannot be loaded, or if its chat template does not
        parse."""
        if self.failure is not None:
            raise StoreError(self.failure)
        if self.tokenizer is None or not self.tokenizer.has_chat_template:
            return
        from jinja2 import TemplateSyntaxError

        try:
            self.tokenizer.render(_PROBE, add_generation_prompt=True)
        except TemplateSyntaxError as error:
            raise StoreError(
                f"{self.assets}: the chat template of tenant {self.tenant!r} does not parse (line "
                f"{error.lineno}: "
                f"{error.message}); mend chat_template.jinja, or the field chat_template of "
                "tokenizer_config.json"
            ) from error
        except Exception:
            return  # a template may refuse this conversation, or need what a request brings

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer is not None

    def require(self, instead: str) -> Tokenizer:
        """The tokenizer. Raises RequestError without one, TenantUnavailableError for one that
        cannot be loaded."""
        if self.failure is not None:
            raise TenantUnavailableError(self.tenant, self.failure)
        if self.tokenizer is None:
            raise RequestError(f"tenant {self.tenant!r} has no tokenizer; {instead}")
        return self.tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError for half a surrogate pair, and as
        `require`."""
        tokenizer = self.require("give the prompt as a list of token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half a surrogate pair at character {error.start}; send whole "
                "characters"
            ) from error
        return tokenizer.encode(text, add_special_tokens)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer: no special tokens but, at its end, the end-of-sequence one if
        there is one."""
        tokenizer = self.require("give the answer as a list of token ids")
        ids = tokenizer.encode(text, add_special_tokens=False)
        ends = self.generation.eos_token_ids
        if not ends:
            return ids
        # Training ends answers with the tokenizer's own token.
        own = tokenizer.eos_token_id
        return [*ids, own if own is not None and own in ends else ends[0]]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str | None:
        """The text of whole answers, None without a tokenizer."""
        return (
            None
            if self.tokenizer is None
            else self.tokenizer.decode(token_ids, skip_special_tokens)
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation, see `render`."""
        return self.encode(self.render(messages, **options), add_special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """A conversation in the tenant's chat template.

        options: of transformers' `apply_chat_template`; the assistant's turn is begun unless they
            say otherwise.
        """
        tokenizer = self._chat_tokenizer()
        return tokenizer.render(messages, **{"add_generation_prompt": True, **options})

    @property
    def chat_template(self) -> str | None:
        """The template's text; None if there are several without a default. Raises RequestError if
        there is none."""
        return self._chat_tokenizer().chat_template

    def _chat_tokenizer(self) -> Tokenizer:
        tokenizer = self.require("give the prompt as a list of token ids")
        if not tokenizer.has_chat_template:
            raise RequestError(
                f"tenant {self.tenant!r} has no chat template; give the prompt as plain text"
            )
        return tokenizer

    def grammar(self, wanted: StructuredOutputs, vocab_size: int) -> Grammar:
        """What may come in an answer. vocab_size: of the model. Raises RequestError."""
        tokenizer = self.require("structured_outputs need one")
        with self._lock:
            if self._grammars is None:
                self._grammars = tokenizer.grammars(vocab_size, self.generation.eos_token_ids)
        grammar = self._grammars.of(wanted)
        if wanted.behind is not None:
            ids = tokenizer.encode(wanted.behind, add_special_tokens=False)
            if len(ids) != 1:
                raise RequestError(
                    f"structured_outputs.behind: {wanted.behind!r} is no token of tenant "
                    f"{self.tenant!r}; leave out the structure, or the reasoning"
                )
            grammar.begin_behind(ids[0])
        return grammar

    def stop_token(self, stop: str, skip_special_tokens: bool) -> int | None:
        """The special token that a stop string is, None if it is text.

        Raises RequestError for a stop string that no answer's text can hold, as special tokens are
        left out of it.
        """
        special = (
            {}
            if self.tokenizer is None or not skip_special_tokens
            else self.tokenizer.special_tokens
        )
        if stop in special:
            return special[stop]
        inside = next((token for token in special if token in stop), None)
        if inside is not None:
            raise RequestError(
                f"stop {stop!r} holds the special token {inside!r}, which text leaves out, so it "
                "can never match; "
                f"give {inside!r} alone, or set skip_special_tokens to false"
            )
        return None
