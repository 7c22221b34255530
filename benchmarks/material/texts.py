"""Texts of several kinds, with a fixed part held out, and rows of tokens drawn from them.

base  WikiText-2: validation part to train on, test part held out
ptb   Penn Treebank (newspaper): the same
code  Python source of this interpreter's standard library; a fixed tenth of the files is held out
docs  docstrings of the same files, with the same split
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from common import MoetelError

TENANTS = ("base", "ptb", "code", "docs")
FILES = {
    "base": ("wikitext2_validation.txt", "wikitext2_test.txt"),
    "ptb": ("ptb_validation.txt", "ptb_test.txt"),
}
HELD_OUT_SHARE = 10  # one file of the standard library in ten

# Parts of the standard library that are tests, or long tables rather than text.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class Texts:
    """A tenant's documents: what training may show, and what is held out for scores."""

    training: list[str]
    heldout: list[str]


def read_texts(folder: Path, max_characters: int) -> dict[str, Texts]:
    """Texts of all tenants, each side cut to max_characters. Raises MoetelError where a file is
    missing."""
    found = {}
    for tenant, names in FILES.items():
        for name in names:
            if not (folder / name).is_file():
                raise MoetelError(
                    f"{folder}: there is no {name}; --texts names the folder that holds it"
                )
        training, heldout = (
            (folder / name).read_text(encoding="utf-8")[:max_characters] for name in names
        )
        found[tenant] = Texts([training], [heldout])
    sources = standard_library()
    for tenant, take in (("code", str), ("docs", docstrings)):
        sides: dict[bool, list[str]] = {False: [], True: []}
        sizes = {False: 0, True: 0}
        for name, source in sources.items():
            side = is_held_out(name)
            if sizes[side] >= max_characters:
                continue
            text = take(source)
            if text and sizes[side] + len(text) <= max_characters:
                sides[side].append(text)
                sizes[side] += len(text)
        found[tenant] = Texts(sides[False], sides[True])
    return {tenant: found[tenant] for tenant in TENANTS}


def is_held_out(name: str) -> bool:
    """Whether a file of the standard library, named by its path inside it, is held out: a fixed
    tenth of them."""
    return zlib.crc32(f"held out? {name}".encode()) % HELD_OUT_SHARE == 0


def standard_library() -> dict[str, str]:
    """Python sources of the running interpreter's standard library by path inside it, in a fixed
    mixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if SKIPPED.isdisjoint(name.split("/")):
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    # Not alphabetical: a cut by size must not take one end of the library only.
    return {name: found[name] for name in sorted(found, key=lambda n: (zlib.crc32(n.encode()), n))}


def docstrings(source: str) -> str:
    """The docstrings of a module and of its classes and functions, blank lines between them; "" if
    it is no Python."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates and deliberately broken files
        return ""
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
    return "\n\n".join(text for text in texts if text)


class Windows:
    """Rows of a stream of token ids that start anywhere, BOS before each."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], context: int):
        rows = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
        self._stream = torch.tensor(
            [token for ids in rows for token in [*ids, tokenizer.eos_token_id]]
        )
        self._bos, self._length = tokenizer.bos_token_id, context - 1
        self.num_tokens = len(self._stream)
        if self.num_tokens < context:
            raise MoetelError(
                f"a training text of {self.num_tokens} tokens is shorter than one row of {context}"
            )

    def batch(self, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, int64 [size, context]; every token but BOS is to be learnt."""
        starts = torch.tensor(
            [rng.randrange(len(self._stream) - self._length + 1) for _ in range(size)]
        )
        rows = self._stream[starts[:, None] + torch.arange(self._length)]
        ids = torch.cat([torch.full((size, 1), self._bos), rows], dim=1)
        labels = ids.clone()
        labels[:, 0] = -100
        return ids, labels


class Mixture:
    """Rows of several streams, each row of any of them with the same chance."""

    def __init__(self, streams: Sequence[Windows]):
        self._streams = streams

    def batch(self, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Windows.batch`."""
        rows = [stream.batch(1, rng) for stream in rng.choices(self._streams, k=size)]
        return torch.cat([ids for ids, _ in rows]), torch.cat([labels for _, labels in rows])


def pieces(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], context: int) -> list[str]:
    """The documents cut into texts of at most `context` tokens, BOS included.

    Cuts are at tokens that begin with white space, where the tokenizer splits anyway, so that a
    piece's tokens are those it has in its document.
    """
    found = []
    for document in documents:
        offsets = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        start = 0
        while start < len(offsets):
            end = min(start + context - 1, len(offsets))
            cut = end
            while end < len(offsets) and cut > start and not document[offsets[cut][0]].isspace():
                cut -= 1
            end = cut if cut > start else end
            found.append(document[offsets[start][0] : offsets[end - 1][1]])
            start = end
    return [text for text in found if text.strip()]


def spread(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], num_tokens: int) -> list[str]:
    """Texts evenly spaced over all of them, in order, of about num_tokens tokens; all if there are
    no more."""
    total = sum(map(len, tokenizer(list(texts))["input_ids"]))
    count = min(len(texts), max(1, round(len(texts) * num_tokens / max(1, total))))
    return [texts[i * len(texts) // count] for i in range(count)]


def write_lines(path: Path, texts: Sequence[str]) -> None:
    """One {"text": ...} a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
