"""Byte-level tokenizers made from texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(
    texts: Iterable[str], vocab_size: int, special: Mapping[str, str], template: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts. Digits stay single where no text joins them.

    Args:
        special: what transformers calls a token ("eos_token") and the token. Ids are in this order.
        template: what a text becomes, as `TemplateProcessing` spells it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(t, tokenizer.token_to_id(t)) for t in special.values() if t in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
