"""Log probabilities as OpenAI gives them: with each token's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from common.serving.detokenizer import REPLACEMENT
from common.serving.engine import Engine
from common.serving.sampling import TokenLogprob
from scripts.server.answer_shapes import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    ScoredPrompt,
    TokenLogprobs,
    TopLogprob,
)

LOWEST = -9999.0
"""For minus infinity, which JSON does not have; OpenAI's and vLLM's choice."""

Named = tuple[str, list[int]]
"""What a token is called, and its bytes."""


class TokenTexts:
    """Names of an answer's tokens, one after another.

    A chosen token is what it adds to the text, so all of them together are the text: one that
    begins a character adds nothing, and the one that ends it adds all of it. A token that could
    have been chosen is what it would have added; one that would not have ended its character is
    named by its bytes, as `bytes:\\xe2` (OpenAI's form).
    """

    def __init__(
        self,
        engine: Engine,
        tenant: str,
        prompt: Sequence[int],
        skip_special_tokens: bool = True,
        as_ids: bool = False,
    ):
        """prompt: what the answer goes on from. as_ids: name tokens `token_id:N`, as vLLM does.

        Those of a tenant without a tokenizer have no other name.
        """
        self._as_ids = as_ids
        self._tokenizer = engine.text(tenant).tokenizer
        self._decoder, self._clean_up = None, None
        if self._tokenizer is not None:
            # An encoder's prompt is not what the answer's text goes on from.
            before = () if engine.store.config(tenant).is_encoder_decoder else prompt
            self._decoder = self._tokenizer.incremental(before, skip_special_tokens)
            self._clean_up = self._tokenizer.clean_up()
        self._length = 0

    def _take(self, token_id: int, last: bool) -> tuple[Named, int]:
        """Go on after this token; returns its name, and where its text begins in the answer."""
        begin = self._length
        if self._decoder is None or self._tokenizer is None:
            return (f"token_id:{token_id}", []), begin
        raw = self._tokenizer.token_bytes(token_id)
        before, text = self._decoder.unfinished, self._decoder.push(token_id, last)
        if self._clean_up is not None:
            text = self._clean_up.push(text, last)
        self._length += len(text)
        # Bytes that became no character show in the text of the token behind them, and are not that
        # token's own.
        own = text.removeprefix(before)
        return (self._name(token_id, text), list(own.encode() if raw is None else raw)), begin

    def _alternative(self, token_id: int) -> Named:
        """What another token would be called here."""
        if self._decoder is None or self._tokenizer is None:
            return f"token_id:{token_id}", []
        raw = self._tokenizer.token_bytes(token_id)
        text = self._decoder.peek(token_id)
        if REPLACEMENT in text:
            text = text.removeprefix(self._decoder.unfinished)
            text = text if raw is None or text.encode() == raw else ""
        if raw is not None and not text:
            text = "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
        elif not text:  # it is left out of texts, so it is named as it is written
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._name(token_id, text), list(text.encode() if raw is None else raw)

    def _name(self, token_id: int, text: str) -> str:
        return f"token_id:{token_id}" if self._as_ids else text

    def completion(self, found: Sequence[TokenLogprob], last: bool) -> CompletionLogprobs:
        """last: whether the answer ends with these tokens."""
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for i, token in enumerate(found):
            others = [(t, self._alternative(t)[0], p) for t, p in token.top if t != token.token_id]
            (name, _), begin = self._take(token.token_id, last and i == len(found) - 1)
            top = {name: _finite(token.logprob)}
            for other_id, other, logprob in others:
                # One that reads as the token itself may be more probable, which clients look for.
                other = f"token_id:{other_id}" if other == name else other
                # Of others with equal texts, the better one.
                top.setdefault(other, _finite(logprob))
            out.tokens.append(name)
            out.token_logprobs.append(_finite(token.logprob))
            out.top_logprobs.append(top)
            out.text_offset.append(begin)
        return out

    def echo(
        self, prompt: Sequence[int], found: Sequence[TokenLogprob | None], top: int
    ) -> CompletionLogprobs:
        """Of a prompt, if nothing of it was taken yet. found: for each of its tokens, None for the
        first, with at least `top` of the most probable ones."""
        (name, _), begin = self._take(prompt[0], False)
        out = self.completion([cut(t, top) for t in found if t is not None], last=False)
        out.tokens.insert(0, name)
        out.token_logprobs.insert(0, None)
        out.top_logprobs.insert(0, None)
        out.text_offset.insert(0, begin)
        return out

    def prompt(
        self, prompt: Sequence[int], found: Sequence[TokenLogprob | None], top: int
    ) -> ScoredPrompt:
        """The same as vLLM's `prompt_logprobs`."""
        self._take(prompt[0], False)
        out: ScoredPrompt = [None]
        for token in (cut(t, top) for t in found if t is not None):
            others = {t: self._alternative(t)[0] for t, _ in token.top if t != token.token_id}
            (name, _), _ = self._take(token.token_id, False)
            mine = PromptLogprob(
                logprob=_finite(token.logprob), rank=token.rank, decoded_token=name
            )
            ranked = {
                str(t): PromptLogprob(
                    logprob=_finite(logprob), rank=rank, decoded_token=others.get(t, name)
                )
                for rank, (t, logprob) in enumerate(token.top, 1)
            }
            out.append({str(token.token_id): mine} | ranked)
        return out

    def chat(self, found: Sequence[TokenLogprob], last: bool) -> ChatLogprobs:
        """last: whether the answer ends with these tokens."""
        content = []
        for i, token in enumerate(found):
            names = {t: self._alternative(t) for t, _ in token.top if t != token.token_id}
            names[token.token_id], _ = self._take(token.token_id, last and i == len(found) - 1)
            top = [self._top(names[t], logprob) for t, logprob in token.top]
            mine = self._top(names[token.token_id], token.logprob)
            content.append(TokenLogprobs(**mine.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    @staticmethod
    def _top(named: Named, logprob: float) -> TopLogprob:
        return TopLogprob(token=named[0], logprob=_finite(logprob), bytes=named[1])


def joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    """Of tokens and those behind them."""
    return CompletionLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=first.top_logprobs + then.top_logprobs,
        text_offset=first.text_offset + then.text_offset,
    )


def cut(token: TokenLogprob, top: int) -> TokenLogprob:
    """With fewer of the most probable tokens."""
    return replace(token, top=token.top[:top])


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
