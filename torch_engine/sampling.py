"""The choice of next tokens on the device: what `common.serving.sampling.sample` chooses.

All is computed in float64, as there. What the choices ask for goes to the device in one copy, masks
of structured answers in another, and nothing waits for the device.

Legend: rows R, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from common.serving.sampling import Choice, TokenLogprob

# Rows whose tokens are chosen at once: it bounds the memory of their float64 [R, V].
ROWS = 16


def choose(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Next tokens of rows. logits: [R, V], of any type.

    Returns float64 [R, 1] with the tokens, or [R, 3 + 2 * top] where a choice asks for logprobs, of
    `top` tokens at most: then also the token's logprob and rank, the most probable tokens, and
    their logprobs.
    """
    asked = [c.params.logprobs for c in choices if c.params.logprobs is not None]
    top = min(max(asked), logits.shape[1]) if asked else None
    return torch.cat(
        [
            _choose(logits[start : start + ROWS], choices[start : start + ROWS], top)
            for start in range(0, len(choices), ROWS)
        ]
    )


def logprob(row: np.ndarray, choice: Choice) -> TokenLogprob | None:
    """What a row of `choose`, float64 on the host, says of its token."""
    if (wanted := choice.params.logprobs) is None:
        return None
    top = (len(row) - 3) // 2
    ids, values = row[3 : 3 + top].astype(np.int64), row[3 + top :]
    best = tuple(zip(ids[:wanted].tolist(), values[:wanted].tolist(), strict=True))
    return TokenLogprob(int(row[0]), float(row[1]), best, int(row[2]))


def _choose(logits: Tensor, choices: Sequence[Choice], top: int | None) -> Tensor:
    scores = logits.double()
    sent = _Inputs(choices, scores.shape[1]).send(scores.device)
    changed = _allowed(_adjusted(scores, sent), scores, choices)
    tokens = changed.argmax(dim=1)
    if not all(c.params.greedy for c in choices):
        tokens = torch.where(sent["greedy"] > 0, tokens, _drawn(changed, choices, sent))
    if any(c.forced is not None for c in choices):
        tokens = torch.where(sent["forced"] >= 0, sent["forced"].long(), tokens)
    found = tokens[:, None].double()
    if top is None:
        return found
    logs = scores - scores.logsumexp(dim=1, keepdim=True)
    mine = logs.gather(1, tokens[:, None])
    rank = (logs > mine).sum(dim=1, keepdim=True) + 1
    best, ids = logs.topk(top, dim=1)
    return torch.cat([found, mine, rank.double(), ids.double(), best], dim=1)


class _Inputs:
    """What choices ask for, as float64 numbers.

    Of each row: greedy, temperature, top_k, top_p, min_p, uniform, forced (-1: none). For each
    token that is changed its row, its id, and in `bias` what is added; in `seen` by what it is
    divided; in `counted` what is taken away. `banned` has rows and ids alone.
    """

    def __init__(self, choices: Sequence[Choice], vocab: int):
        params = [c.params for c in choices]
        self._fields: dict[str, np.ndarray] = {
            "greedy": np.array([p.greedy for p in params], np.float64),
            "temperature": np.array([p.temperature or 1.0 for p in params]),
            "top_k": np.array([p.top_k for p in params], np.float64),
            "top_p": np.array([p.top_p for p in params], np.float64),
            "min_p": np.array([p.min_p for p in params], np.float64),
            "uniform": np.array([c.uniform for c in choices]),
            "forced": np.array([-1.0 if c.forced is None else c.forced for c in choices]),
        }
        bias: list[np.ndarray] = []
        seen: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        banned: list[np.ndarray] = []
        for row, choice in enumerate(choices):
            p = choice.params
            if p.logit_bias:
                bias.append(_changes(row, list(p.logit_bias), list(p.logit_bias.values())))
            if choice.banned:
                banned.append(_changes(row, [i for i in choice.banned if i < vocab], 0.0))
            if p.repetition_penalty != 1:
                ids = np.unique(np.array([*choice.prompt, *choice.answer], np.int64))
                seen.append(_changes(row, ids, p.repetition_penalty))
            if choice.answer and (p.presence_penalty or p.frequency_penalty):
                ids, counts = np.unique(np.array(choice.answer, np.int64), return_counts=True)
                taken = p.presence_penalty + p.frequency_penalty * counts
                counted.append(_changes(row, ids, taken))
        for name, found in (
            ("bias", bias),
            ("banned", banned),
            ("seen", seen),
            ("counted", counted),
        ):
            self._fields[name] = np.concatenate(found, axis=1) if found else np.zeros((3, 0))

    def send(self, device: torch.device) -> dict[str, Tensor]:
        """The fields on the device, by one copy."""
        together = _sent(np.concatenate([f.reshape(-1) for f in self._fields.values()]), device)
        parts = together.split([f.size for f in self._fields.values()])
        return {
            name: part.view(field.shape)
            for (name, field), part in zip(self._fields.items(), parts, strict=True)
        }


def _changes(row: int, ids: Sequence[int] | np.ndarray, values: ArrayLike) -> np.ndarray:
    """float64 [3, tokens]: row, id and value of each."""
    found = np.empty((3, len(ids)))
    found[0], found[1], found[2] = row, ids, np.asarray(values)
    return found


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    found = torch.from_numpy(array)
    if device.type != "cuda":
        return found
    pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    pinned.copy_(found)
    return pinned.to(device, non_blocking=True)


def _adjusted(scores: Tensor, sent: dict[str, Tensor]) -> Tensor:
    """[R, V]: scores with biases, bans and penalties, in the order of `sampling.adjusted`."""
    bias, banned, seen, counted = (sent[n] for n in ("bias", "banned", "seen", "counted"))
    if not any(changes.shape[1] for changes in (bias, banned, seen, counted)):
        return scores
    found = scores.clone()
    size = found.shape[1]
    flat = found.view(-1)

    def places(changes: Tensor) -> Tensor:
        return (changes[0] * size + changes[1]).long()

    if bias.shape[1]:
        flat.index_add_(0, places(bias), bias[2])
    if banned.shape[1]:
        flat.index_fill_(0, places(banned), -torch.inf)
    if seen.shape[1]:
        at, penalty = places(seen), seen[2]
        values = flat[at]
        flat.index_copy_(0, at, torch.where(values > 0, values / penalty, values * penalty))
    if counted.shape[1]:
        flat.index_add_(0, places(counted), -counted[2])
    return found


def _allowed(changed: Tensor, plain: Tensor, choices: Sequence[Choice]) -> Tensor:
    """[R, V]: -inf where structures allow nothing. Of rows of which nothing is left, the plain
    scores."""
    masks = [None if c.allowed is None else c.allowed() for c in choices]
    if all(mask is None for mask in masks):
        return changed
    size = changed.shape[1]
    every = np.ones(size, bool)
    bits = np.stack([np.packbits(every if m is None else m, bitorder="little") for m in masks])
    sent = _sent(bits, changed.device)
    places = torch.arange(8, dtype=torch.uint8, device=changed.device)
    allowed = ((sent[:, :, None] >> places) & 1).flatten(1)[:, :size].bool()
    left = changed.masked_fill(~allowed, -torch.inf)
    some = left.isfinite().any(dim=1, keepdim=True)
    return torch.where(some, left, plain.masked_fill(~allowed, -torch.inf))


def _drawn(scores: Tensor, choices: Sequence[Choice], sent: dict[str, Tensor]) -> Tensor:
    """int64 [R]: a token of each row, drawn with its uniform number."""
    params = [c.params for c in choices]
    rows, size = scores.shape
    scores = scores / sent["temperature"][:, None]
    most = max((p.top_k for p in params if p.top_k < size), default=0)
    if most > 0:  # ties with the last one are kept
        column = sent["top_k"].long().clamp(1, most)[:, None] - 1
        last = scores.topk(most, dim=1).values.gather(1, column)
        cut = (sent["top_k"] > 0) & (sent["top_k"] < size)
        scores = scores.masked_fill((scores < last) & cut[:, None], -torch.inf)
    chances = (scores - scores.amax(dim=1, keepdim=True)).exp()
    chances = chances / chances.sum(dim=1, keepdim=True)
    ids = torch.arange(size, device=scores.device).expand(rows, size)
    if any(p.top_p < 1 for p in params):
        falling, order = chances.sort(dim=1, descending=True, stable=True)
        before = falling.cumsum(dim=1) - falling
        some = falling.masked_fill(before >= sent["top_p"][:, None], 0)
        cut = (sent["top_p"] < 1)[:, None]
        chances = torch.where(cut, some / some.sum(dim=1, keepdim=True), chances)
        ids = torch.where(cut, order, ids)
    if any(p.min_p > 0 for p in params):
        least = sent["min_p"][:, None] * chances.amax(dim=1, keepdim=True)
        some = chances.masked_fill(chances < least, 0)
        cut = (sent["min_p"] > 0)[:, None]
        chances = torch.where(cut, some / some.sum(dim=1, keepdim=True), chances)
    sums = chances.cumsum(dim=1)
    wanted = sent["uniform"][:, None] * chances.sum(dim=1, keepdim=True)
    places = torch.arange(size, device=scores.device)
    last = torch.where(chances > 0, places, 0).amax(dim=1)
    found = torch.minimum((sums <= wanted).sum(dim=1), last)
    return ids.gather(1, found[:, None])[:, 0]
