"""Train tenants whose texts really differ: a small Mixtral on encyclopaedia text, three fine-tunes
on other kinds.

The tenants and what they are trained on and judged by:

    base  WikiText-2, validation part (--base-on-all: what the others are trained on as well, in
          equal parts, as bases that people fine-tune have seen a bit of everything); judged on the
          test part of WikiText-2
    ptb   Penn Treebank (newspaper), validation part; judged on the test part
    code  Python source of this interpreter's standard library; a fixed tenth of the files is held
    out docs  docstrings of the same files, with the same split

A score is the perplexity of held-out text. Training and scores use Hugging Face's Mixtral and
nothing of Moetel's engine. --texts names the folder with wikitext2_validation.txt,
wikitext2_test.txt, ptb_validation.txt and ptb_test.txt.

    python -m benchmarks.material.train_text --out /tmp/text
    python -m benchmarks.material.train_text --out /tmp/text --texts FOLDER
"""

from __future__ import annotations

import os
import sys

if not __package__:
    # Run as a file, Python puts this folder first on its path, where our inspect.py would stand in
    # for the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import ast
import copy
import json
import math
import random
import sysconfig
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from benchmarks.material.train_demo import (
    BOS,
    Training,
    add_recipe,
    average,
    given,
    is_expert,
    load,
    make_model,
    make_tokenizer,
    moved,
    round_robin_owners,
    save,
    shared,
    train,
    wide_console,
)
from common import MoetelError
from common.progress import bars
from scripts import arguments
from scripts.cli import fail

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
class Recipe(Training):
    """Everything that the result depends on beside the texts. context: tokens of a training row,
    BOS included."""

    hidden_size: int = 128
    intermediate_size: int = 256
    vocab_size: int = 3072
    batch: int = 16
    base_steps: int = 900
    tune_steps: int = 400
    base_lr: float = 2e-3
    tune_lr: float = 1.5e-3
    context: int = 128
    max_characters: int = 2_000_000
    heldout_tokens: int = 30_000
    calibration_tokens: int = 5_000
    base_on_all: bool = False


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


@torch.inference_mode()
def perplexity(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> float:
    """exp of the mean cross-entropy (nats) of all tokens of the texts, each text on its own behind
    BOS."""
    model.eval()
    rows = sorted(tokenizer(list(texts))["input_ids"], key=len)
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, 1 : len(row)] = ids[i, 1 : len(row)]
        # Attention is causal and padding is on the right: no row sees padding, so no mask is
        # needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        total, count = total + float(loss), count + int((labels >= 0).sum())
    return math.exp(total / count)


def write_lines(path: Path, texts: Sequence[str]) -> None:
    """One {"text": ...} a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def run(recipe: Recipe, folder: Path, out: Path, console: Console) -> dict[str, Any]:
    """Train, save, score; returns what goes to metrics.json. Raises MoetelError."""
    started = time.perf_counter()
    texts = read_texts(folder, recipe.max_characters)
    # Equal shares, so that no tenant's words are spelled in bytes.
    share = min(500_000, *(sum(map(len, t.training)) for t in texts.values()))
    tokenizer = make_tokenizer(
        [
            part
            for t in texts.values()
            for part in "\n".join(t.training)[:share].splitlines(keepends=True)
        ],
        recipe.vocab_size,
        template=f"{BOS} $A",
    )
    heldout: dict[str, list[str]] = {}
    for tenant, its in texts.items():
        heldout[tenant] = spread(
            tokenizer, pieces(tokenizer, its.heldout, recipe.context), recipe.heldout_tokens
        )
        calibration = spread(
            tokenizer, pieces(tokenizer, its.training, recipe.context), recipe.calibration_tokens
        )
        write_lines(out / "texts" / f"{tenant}.heldout.jsonl", heldout[tenant])
        write_lines(out / "texts" / f"{tenant}.calibration.jsonl", calibration)
    base = make_model(recipe, tokenizer)
    parameters = {n: p.numel() for n, p in base.named_parameters()}
    experts = sum(count for n, count in parameters.items() if is_expert(n))
    console.print(
        f"{sum(parameters.values())} parameters, {experts / sum(parameters.values()):.0%} of them "
        "experts"
    )
    losses = {}
    windows = {
        tenant: Windows(tokenizer, its.training, recipe.context) for tenant, its in texts.items()
    }
    num_tokens = {tenant: its.num_tokens for tenant, its in windows.items()}
    for tenant, own in windows.items():
        is_base = tenant == "base"
        model = base if is_base else copy.deepcopy(base)
        steps, lr, seed = (
            (recipe.base_steps, recipe.base_lr, recipe.seed)
            if is_base
            else (recipe.tune_steps, recipe.tune_lr, recipe.seed + 1)
        )
        shown = Mixture(list(windows.values())) if is_base and recipe.base_on_all else own
        with bars(tenant, steps) as advance:
            losses[tenant] = train(model, shown, steps, recipe.batch, lr, seed, advance)
        save(model, tokenizer, out / tenant)
    trained_s = time.perf_counter() - started
    metrics = evaluate(out, tokenizer, heldout, console) | {
        "training_tokens": num_tokens,
        "date": date.today().isoformat(),
        "recipe": asdict(recipe),
        "parameters": sum(parameters.values()),
        "expert_parameters": experts,
        "first_loss": {name: sum(values[:5]) / len(values[:5]) for name, values in losses.items()},
        "last_loss": {
            name: sum(values[-20:]) / len(values[-20:]) for name, values in losses.items()
        },
        "training_s": round(trained_s),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        | {"python": python_version()},
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def evaluate(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    heldout: Mapping[str, Sequence[str]],
    console: Console,
) -> dict[str, Any]:
    """Perplexities of the saved checkpoints on each tenant's held-out text.

    Experts are shared among all four, the base being one of the tenants.
    """
    models = {tenant: load(out / tenant) for tenant in heldout}
    tenants = list(models.values())
    owners, mean = round_robin_owners(tenants), average(tenants)
    titles = (
        "held-out text",
        *models,
        "own, experts shared",
        "average of all weights",
        "experts moved",
        "others moved",
    )
    table = Table(title="perplexity of held-out text", title_justify="left")
    for title in titles:
        table.add_column(title, justify="right")
    rows: dict[str, Any] = {}
    with bars("scoring", len(models)) as advance:
        for i, (tenant, texts) in enumerate(heldout.items()):
            by_model = {name: perplexity(model, tokenizer, texts) for name, model in models.items()}
            distance = moved(models[tenant], models["base"])
            row = {
                "base": by_model["base"],
                "alone": by_model[tenant],
                "shared_round_robin": perplexity(shared(tenants, i, owners), tokenizer, texts),
                "plain_average": perplexity(mean, tokenizer, texts),
                "by_model": by_model,
                "relative_l2_experts": distance["experts"],
                "relative_l2_non_experts": distance["non_experts"],
                "heldout_tokens": sum(len(ids) - 1 for ids in tokenizer(list(texts))["input_ids"]),
            }
            rows[tenant] = row
            figures = (*by_model.values(), row["shared_round_robin"], row["plain_average"])
            table.add_row(
                tenant, *(f"{v:.2f}" for v in figures), *(f"{v:.1%}" for v in distance.values())
            )
            advance()
    console.print(table)
    return {"tenants": rows}


def default_texts() -> Path:
    """Folder of the texts: below $MOETEL_SHARED, else below shared/ beside the repository."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared"
    return Path(os.environ.get("MOETEL_SHARED") or beside) / "data" / "text"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=arguments.path, required=True)
    parser.add_argument(
        "--texts", type=arguments.path, default=default_texts(), help=f"default: {default_texts()}"
    )
    add_recipe(parser, Recipe())
    parser.add_argument(
        "--base-on-all",
        action="store_true",
        help="train the base on the other tenants' texts as well",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        run(replace(Recipe(), **given(args, Recipe())), args.texts, args.out, wide_console())
    except MoetelError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
