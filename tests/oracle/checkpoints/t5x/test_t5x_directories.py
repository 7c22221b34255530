"""T5X directories without Hugging Face's files: text all the same, and the causes of what cannot be
read."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from transformers import T5Tokenizer

from common import CheckpointError, SamplingParams, build_store, load_engine
from common.checkpoints import open_checkpoint, write_orbax, write_t5x
from tests import helpers, switch, switch_models

WORDS = "the people could call their first number find a long way down to water and see him write more".split()  # noqa: E501


def vocabulary(path: Path) -> Path:
    """A tiny T5 vocabulary of sentencepiece's own making."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    made = io.BytesIO()
    text = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    trainer.train(
        sentence_iterator=iter(text),
        model_writer=made,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    path.write_bytes(made.getvalue())
    return path


@pytest.mark.parametrize(
    "file", ["sentencepiece.model", "cc_all.32000.100extra.sentencepiece.model", "spiece.model"]
)
@pytest.mark.parametrize("kind", ["t5x", "orbax"])
def test_a_vocabulary_beside_the_arrays_gives_text(kind: str, file: str, tmp_path: Path) -> None:
    """No config.json, no tokenizer_config.json: prompts and answers are those of transformers' T5
    tokenizer."""
    pytest.importorskip("jax")
    model = switch_models.random_switch(3, vocab_size=256, relative_attention_max_distance=128)
    source = helpers.save(model, tmp_path / "source")
    path = tmp_path / "checkpoint"
    path.mkdir()
    (write_t5x if kind == "t5x" else write_orbax)(path, open_checkpoint(source))
    made = vocabulary(path / file)
    tokenizer = T5Tokenizer.from_pretrained(vocabulary(source / "spiece.model").parent)
    store = build_store(tmp_path / "store", {"t": path})
    notes = store.tenant("t").notes
    assert any(f"{file} is taken as the vocabulary" in note for note in notes) == (
        file != "spiece.model"
    )
    assert (store.assets_dir("t") / "spiece.model").read_bytes() == made.read_bytes()
    prompt = "the people could find water"
    with load_engine(store.path) as engine:
        # Token 1 ends an answer, as T5's defaults have it and the notes say.
        answer = engine.generate("t", prompt, SamplingParams(max_new_tokens=6))
        forced = engine.generate(
            "t", prompt, SamplingParams(max_new_tokens=6, logit_bias={1: 100.0})
        )
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) > 4 and ids[-1] == 1
    expected = switch_models.hf_greedy(model, ids, 6, eos=1)
    assert list(answer.token_ids) == expected
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert forced.finish_reason == "stop" and len(forced.token_ids) == 1


def test_several_vocabularies_are_named_and_none_taken(tmp_path: Path) -> None:
    path = switch.write_t5x(
        tmp_path / "checkpoint_3", switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    )
    for name in ("a.model", "b.model"):
        (path / name).write_bytes(b"pieces")
    found = open_checkpoint(path)
    assert set(found.assets) == {"config.json"}
    assert any(
        "no vocabulary taken, there are several (a.model, b.model)" in note for note in found.notes
    )


def test_scanned_layers_are_called_so(tmp_path: Path) -> None:
    """What t5x's scan leaves: encoder.encoder.*, with an axis of layers in each array."""
    arrays = switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    scanned = {
        n.replace(".layers_0.", f".{n.split('.')[0]}."): a
        for n, a in arrays.items()
        if ".layers_" not in n or ".layers_0." in n
    }
    path = switch.write_t5x(tmp_path / "checkpoint_3", scanned)
    with pytest.raises(
        CheckpointError,
        match=r"target\.\w+coder\.\w+coder\.\S+ is \[.*\], one for all layers: .*scanned layers",
    ):
        open_checkpoint(path)


def test_a_config_beside_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    path = switch.write_t5x(
        tmp_path / "checkpoint_3", switch.t5x_parameters(switch.arrays_of(switch.random_switch()))
    )
    (path / "config.json").write_text('{"attention_bias": true}')
    with pytest.raises(CheckpointError, match=r"config\.json: field 'attention_bias' is True"):
        open_checkpoint(path)
