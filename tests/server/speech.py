"""Tokenizers of the kinds that tenants have, made with `tokenizers` and transformers alone."""

from __future__ import annotations

import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = "the people could find some words that were over there, and more of them: naïve café, 日本語 😀 don't ."  # noqa: E501
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _wrapped(
    tokenizer: Tokenizer, template: str | None = CHATML, **options: object
) -> PreTrainedTokenizerFast:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
        **options,
    )
    found.chat_template = template
    return found


def metaspace(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """As Mixtral's: words with their spaces, and a token for each byte of what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    alphabet = sorted({c for c in WORDS if c.isascii()} - {" "} | {"▁", "\n", "[", "]"})
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=60,
        show_progress=False,
    )
    plain = "".join(c for c in WORDS if c.isascii())
    tokenizer.train_from_iterator([plain] * 3, trainer)
    # Training marks the bytes as special; a checkpoint's are ordinary tokens.
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [t for t in made["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(tokenizer, template)


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: tokens of bytes, some of which end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return _wrapped(tokenizer, template)


def word_piece(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """As BERT's: pieces of words, and a text that is cleaned of spaces when it is finished."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return _wrapped(tokenizer, template, clean_up_tokenization_spaces=True)


KINDS = {"metaspace": metaspace, "byte_level": byte_level, "word_piece": word_piece}
VOCAB = 384
"""Of models that speak any of them."""
