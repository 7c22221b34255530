"""Log probabilities as OpenAI gives them: with each token's text."""

from __future__ import annotations

from collections.abc import Sequence

from common.engine import Engine
from common.sampling import TokenLogprob
from scripts.server.schema import ChatLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob

CONTEXT = 4
"""Tokens before one that its text is read after: many tokenizers write a word otherwise at the beginning of a text."""

LOWEST = -9999.0
"""For minus infinity, which JSON does not have; OpenAI's and vLLM's choice."""


class TokenTexts:
    """Texts of an answer's tokens, one after another. Of a tenant without a tokenizer `token_id:N`, as vLLM's."""

    def __init__(self, engine: Engine, tenant: str):
        self._engine, self._tenant = engine, tenant
        self._named = engine.has_tokenizer(tenant)
        self._before: list[int] = []
        self._known = ""
        self._length = 0

    def _text(self, token_id: int) -> str:
        if not self._named:
            return f"token_id:{token_id}"
        grown = self._engine.detokenize(self._tenant, [*self._before, token_id])
        if grown.startswith(self._known):
            return grown[len(self._known) :]
        return self._engine.detokenize(self._tenant, [token_id])  # it ends a character that was begun before

    def _take(self, token_id: int, text: str) -> int:
        """Go on after this token; returns where its text begins in the answer."""
        if self._named:
            self._before = [*self._before, token_id][-CONTEXT:]
            self._known = self._engine.detokenize(self._tenant, self._before)
        begin = self._length
        self._length += len(text)
        return begin

    def completion(self, found: Sequence[TokenLogprob]) -> CompletionLogprobs:
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in found:
            text = self._text(token.token_id)
            top: dict[str, float] = {}
            for token_id, logprob in token.top:
                top.setdefault(self._text(token_id), _finite(logprob))  # of tokens with equal texts, the better one
            top.setdefault(text, _finite(token.logprob))
            out.tokens.append(text)
            out.token_logprobs.append(_finite(token.logprob))
            out.top_logprobs.append(top)
            out.text_offset.append(self._take(token.token_id, text))
        return out

    def chat(self, found: Sequence[TokenLogprob]) -> ChatLogprobs:
        content = []
        for token in found:
            text = self._text(token.token_id)
            top = [self._top(self._text(token_id), logprob) for token_id, logprob in token.top]
            mine = self._top(text, token.logprob)
            content.append(TokenLogprobs(token=text, logprob=mine.logprob, bytes=mine.bytes, top_logprobs=top))
            self._take(token.token_id, text)
        return ChatLogprobs(content=content)

    @staticmethod
    def _top(text: str, logprob: float) -> TopLogprob:
        return TopLogprob(token=text, logprob=_finite(logprob), bytes=list(text.encode("utf-8", "replace")))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
