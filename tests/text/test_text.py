"""Text that appears token by token: whole characters, stop strings, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import RequestError, StoreError, TenantUnavailableError
from common.serving.tenant_text import TenantText
from common.serving.text_stream import TextStream
from tests.helpers import examples

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TenantText:
    """One token a byte, so that every character beyond ASCII is split."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    ).save_pretrained(path)
    return TenantText("bytes", path)


def pieces(
    text: TenantText, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    stream = TextStream(text, stop)
    found = []
    for i, token_id in enumerate(ids):
        found.append(stream.push(token_id, last=i == len(ids) - 1))
        if stream.stopped:
            break
    return found, stream


SAMPLE = st.text(alphabet=st.sampled_from("ab é ß漢字🙂👩‍👩‍👧ñ\n"), min_size=1, max_size=30)


@settings(max_examples=examples(150), deadline=None)
@given(sample=SAMPLE)
def test_pieces_make_the_whole_and_split_no_character(text: TenantText, sample: str) -> None:
    ids = text.encode(sample)
    assert len(ids) == len(sample.encode())
    found, stream = pieces(text, ids)
    assert "".join(found) == stream.emitted == sample
    assert not any("\ufffd" in piece for piece in found)
    # A character comes with its last byte, not later.
    for count in range(1, len(ids) + 1):
        whole = sample.encode()[:count].decode(errors="ignore")
        assert "".join(found[:count]) == whole


@settings(max_examples=examples(150), deadline=None)
@given(sample=SAMPLE, stop=st.text(alphabet="ab é漢", min_size=1, max_size=4))
def test_stop_strings_are_found_wherever_they_begin(
    text: TenantText, sample: str, stop: str
) -> None:
    found, stream = pieces(text, text.encode(sample), (stop,))
    assert "".join(found) == sample.split(stop)[0]
    assert stream.stopped == (stop in sample)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> TenantText:
    """As Mixtral's own tokenizer: words joined by a mark, characters beyond the vocabulary as
    `<0xNN>` bytes.

    Its decoder turns a run of bytes into replacements altogether unless the whole run is valid.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abé\n"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    path = tmp_path_factory.mktemp("fallback")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return TenantText("fallback", path)


@settings(max_examples=examples(150), deadline=None)
@given(sample=SAMPLE)
def test_bytes_that_stand_in_for_characters_are_joined(fallback: TenantText, sample: str) -> None:
    ids = fallback.encode(sample)
    found, stream = pieces(fallback, ids)
    assert "".join(found) == stream.emitted == fallback.decode(ids) == sample
    assert not any("\ufffd" in piece for piece in found)


def test_a_long_run_of_bytes_comes_character_by_character(fallback: TenantText) -> None:
    found, _ = pieces(
        fallback, fallback.encode("🙂" * 50)[1:]
    )  # without the mark before the first word
    assert found == ["", "", "", "🙂"] * 50


@settings(max_examples=examples(50), deadline=None)
@given(sample=SAMPLE, stop=st.text(alphabet="ab é漢", min_size=1, max_size=4))
def test_stop_strings_of_bytes_are_found(fallback: TenantText, sample: str, stop: str) -> None:
    found, stream = pieces(fallback, fallback.encode(sample), (stop,))
    assert "".join(found) == sample.split(stop)[0]
    assert stream.stopped == (stop in sample)


def test_what_may_become_a_stop_string_is_held_back(text: TenantText) -> None:
    found, _ = pieces(text, text.encode("xabyabc"), ("abc",))
    assert found == ["x", "", "", "aby", "", "", ""]
    found, _ = pieces(text, text.encode("xab"), ("abc",))
    assert found == ["x", "", "ab"]  # the end comes first
    found, stream = pieces(text, text.encode("one two"), ("two", "e t"))
    assert stream.emitted == "on"


def test_an_answer_cut_inside_a_character(text: TenantText) -> None:
    ids = text.encode("aé")[:-1]
    found, _ = pieces(text, ids)
    assert found == ["a", "\ufffd"]  # the half is shown as what it is, at the end alone
    stream = TextStream(text, ())
    assert [stream.push(i) for i in ids] == ["a", ""]
    assert stream.finish() == "\ufffd"


def test_a_replacement_character_of_the_models_own(text: TenantText) -> None:
    found, _ = pieces(text, text.encode("a\ufffdb"))
    assert "".join(found) == "a\ufffdb"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    bare = TenantText("bare", tmp_path)
    assert not bare.has_tokenizer and bare.decode([1]) is None and bare.failure is None
    bare.check()
    with pytest.raises(
        RequestError, match="tenant 'bare' has no tokenizer; give the prompt as a list of token ids"
    ):
        bare.encode("hello")
    with pytest.raises(
        RequestError, match="tenant 'bare' has no tokenizer; give the prompt as a list of token ids"
    ):
        bare.chat([{"role": "user", "content": "hello"}])


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    text = TenantText("x", tmp_path)
    with pytest.raises(
        StoreError, match=r"the tokenizer of tenant 'x' cannot be loaded.*build again"
    ):
        text.check()
    with pytest.raises(
        TenantUnavailableError,
        match=r"tenant 'x' cannot answer this: .*the tokenizer of tenant 'x'",
    ):
        text.encode("hello")
