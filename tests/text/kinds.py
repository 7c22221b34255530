"""Small tokenizers of the five kinds that people's models have, made with the library `tokenizers`
alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "people",
    "could",
    "find",
    "hot",
    "re",
    "s",
    "t",
    "ve",
    "not",
    "don",
)
MARKS = (".", ",", "?", "!", "'", "n't", "'s")
CHARACTERS = "é漢🙂"
SPECIAL = ("<|im_start|>", "<|im_end|>")


def _save(path: Path, tokenizer: Tokenizer, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    known = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(known | config))
    return path


def llama(path: Path) -> Path:
    """SentencePiece's BPE with byte fallback, as Llama's and Mixtral's: a word begins with its
    space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *MARKS]
    letters = sorted(set("".join(WORDS)) - set(pieces))
    vocab = {
        piece: i
        for i, piece in enumerate(
            dict.fromkeys([*pieces, *letters, *(f"▁{w}" for w in WORDS), *WORDS])
        )
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return _save(path, tokenizer)


def byte_level(path: Path) -> Path:
    """GPT-2's and Qwen's: every token is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *alphabet, *(f"Ġ{w}" for w in WORDS)])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return _save(path, tokenizer)


def unigram(path: Path, clean_up: bool = False) -> Path:
    """SentencePiece's Unigram, as T5's and Switch's."""
    marks = [*MARKS, *(f"▁{m}" for m in MARKS)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *marks, *(f"▁{w}" for w in WORDS), *WORDS]
    tokenizer = Tokenizer(
        models.Unigram([(p, -float(i)) for i, p in enumerate(dict.fromkeys(pieces))], unk_id=2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<pad>", "</s>", "<extra_id_0>")]
    )
    return _save(
        path, tokenizer, bos_token=None, pad_token="<pad>", clean_up_tokenization_spaces=clean_up
    )


def unigram_cleaned(path: Path) -> Path:
    """What transformers 4 wrote for every T5 fine-tune: spaces before punctuation are removed from
    a finished text."""
    return unigram(path, clean_up=True)


def word_piece(path: Path) -> Path:
    """BERT's: a token continues a word, or begins one."""
    pieces = ["<unk>", "<s>", "</s>", *MARKS, *(f"##{w}" for w in WORDS), *WORDS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return _save(path, tokenizer, clean_up_tokenization_spaces=True)


KINDS: dict[str, Callable[[Path], Path]] = {
    kind.__name__: kind for kind in (llama, byte_level, unigram, unigram_cleaned, word_piece)
}
