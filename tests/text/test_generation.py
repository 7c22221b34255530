"""What a checkpoint's files say about generating, and what was made of it: in the store, in
answers, in an export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import SwitchTransformersForConditionalGeneration

from common import CheckpointError, SamplingParams, Store, add_tenant, build_store, load_engine
from common.checkpoints.generation_config import _NEUTRAL, SAMPLING, GenerationConfig, decide
from common.errors import RequestError, TenantUnavailableError
from common.families import FAMILIES
from common.store.manifest import Manifest
from tests import helpers
from tests.conftest import Family
from tests.switch_models import random_switch
from tests.text.kinds import KINDS

# Settings of transformers that change how an answer is computed or returned, and not which answer
# it is; beams and speculation are off unless `num_beams` and an assistant say otherwise.
HARMLESS = {
    "do_sample",
    "early_stopping",
    "length_penalty",
    "use_cache",
    "use_mtp",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "prefill_chunk_size",
    "_from_model_config",
    "transformers_version",
}
TOKENS = {
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
}


def config(**changes: Any) -> Any:
    raw = {**helpers.SIZES, "model_type": "mixtral", **changes}
    return FAMILIES["mixtral"].parse_config(
        {k: v for k, v in raw.items() if v != "absent"}, "config.json"
    )


def decided(
    tmp_path: Path, given: dict[str, Any] | None, tokenizer_eos: int | None = None, **raw: Any
) -> Any:
    path = None
    if given is not None:
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps(given))
    return decide(config(**raw), path, default_eos=2, tokenizer_eos=tokenizer_eos)


def test_every_setting_of_transformers_has_a_place() -> None:
    known = TOKENS | set(SAMPLING) | set(_NEUTRAL) | HARMLESS
    unknown = set(vars(TransformersGenerationConfig())) - known
    assert not unknown, (
        f"say of {sorted(unknown)} whether they are applied, change answers, or do neither"
    )


@pytest.mark.parametrize(
    ("given", "raw", "tokenizer", "ends"),
    [
        ({"eos_token_id": [7, 9]}, 5, 3, (7, 9, 5, 3)),
        ({"eos_token_id": 5}, 5, 5, (5,)),
        ({}, 5, None, (5,)),
        (None, [5, 6], None, (5, 6)),
        (None, None, None, ()),  # null says that there is none
        (None, "absent", None, (2,)),  # transformers.MixtralConfig's default
        (None, "absent", 4, (4,)),
        (None, None, 96, ()),  # the tokenizer knows more tokens than the head gives
    ],
)
def test_an_answer_ends_at_what_any_file_names(
    given: dict[str, Any] | None,
    raw: Any,
    tokenizer: int | None,
    ends: tuple[int, ...],
    tmp_path: Path,
) -> None:
    assert decided(tmp_path, given, tokenizer, eos_token_id=raw).eos_token_ids == ends


@pytest.mark.parametrize("value", ["2", [[2]], 96, -1, True, 2.0, {"a": 1}, [2, None]])
def test_what_is_no_token_is_refused_by_file_and_field(value: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: field 'eos_token_id' is .*0 to 95"
    ):
        decided(tmp_path, {"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"config\.json: field 'eos_token_id' is "):
        decided(tmp_path, None, eos_token_id=value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, expected a JSON object"),
        ("\x00", "cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_named(content: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {what}"):
        decide(config(), path, default_eos=2)


def test_sampling_defaults_and_what_is_not_applied(tmp_path: Path) -> None:
    given = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "num_beams": 4,
        "no_repeat_ngram_size": 0,
    }
    found = decided(tmp_path, given | {"do_sample": True, "suppress_tokens": [], "typical_p": 0.5})
    assert found.sampling == {"temperature": 0.6, "top_p": 0.9}
    assert found.unused == ("num_beams", "typical_p")
    assert "num_beams, typical_p" in found.notes()[0]
    assert GenerationConfig.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 1\.5"):
        decided(tmp_path, {"top_p": 1.5})


# In a store.


@pytest.fixture(scope="module")
def talking(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with a tokenizer whose own end token no config names."""
    path = tmp_path_factory.mktemp("talking") / "checkpoint"
    tokens = KINDS["llama"](path)
    size = len(json.loads((tokens / "tokenizer.json").read_text())["model"]["vocab"]) + 2
    helpers.save(helpers.random_mixtral(3, vocab_size=size), path)
    edit(path / "tokenizer_config.json", eos_token="<|im_end|>")
    return path


def edit(path: Path, **changes: Any) -> None:
    given = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(given | changes))


def copied(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def special(store: Store, tenant: str) -> int:
    with load_engine(store) as engine:
        return engine.tokenize(tenant, "<|im_end|>", add_special_tokens=False)[-1]


def test_the_tokenizers_end_ends_answers(talking: Path, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", {"t": talking})
    end = special(store, "t")
    assert store.generation("t").eos_token_ids == (2, end)
    with load_engine(store) as engine:
        out = engine.generate(
            "t", "the people", SamplingParams(max_new_tokens=8, logit_bias={end: 100})
        )
        assert (out.finish_reason, out.token_ids, out.text) == ("stop", (end,), "")
        assert engine.text("t").generation.eos_token_ids == (2, end)
        assert engine.answer_ids("t", "the")[-1] == end


def test_stop_strings_that_are_special_tokens(talking: Path, tmp_path: Path) -> None:
    checkpoint = copied(talking, tmp_path / "checkpoint")
    edit(checkpoint / "tokenizer_config.json", eos_token="</s>")
    store = build_store(tmp_path / "store", {"t": checkpoint})
    end = special(store, "t")
    always = {"max_new_tokens": 4, "logit_bias": {end: 100}}
    with load_engine(store) as engine:
        assert engine.generate("t", "the", SamplingParams(**always)).finish_reason == "length"
        out = engine.generate("t", "the", SamplingParams(stop=["x", "<|im_end|>"], **always))
        assert (out.finish_reason, out.stop_reason, out.text, out.token_ids) == (
            "stop",
            "<|im_end|>",
            "",
            (end,),
        )
        shown = SamplingParams(
            stop="<|im_end|>", include_stop_str_in_output=True, skip_special_tokens=False, **always
        )
        assert engine.generate("t", "the", shown).text == "<|im_end|>"
        assert (
            engine.generate("t", "the", SamplingParams(skip_special_tokens=False, **always)).text
            == "<|im_end|>" * 4
        )
        with pytest.raises(
            RequestError, match=r"stop '<\|im_end\|>\\n' holds the special token .* can never match"
        ):
            engine.generate("t", "the", SamplingParams(stop="<|im_end|>\n"))


def test_answers_keep_the_space_of_their_first_word(talking: Path, tmp_path: Path) -> None:
    with load_engine(build_store(tmp_path / "store", {"t": talking})) as engine:
        word = engine.tokenize("t", "people", add_special_tokens=False)[0]
        out = engine.generate("t", "the", SamplingParams(max_new_tokens=2, logit_bias={word: 100}))
        assert out.token_ids == (word, word)
        assert out.text == engine.detokenize("t", [word, word, word])[-len(str(out.text)) :]
        assert str(out.text).startswith(" ")


BAD = {
    "tokenizer.json": ("{", r"the tokenizer of tenant 'bad' cannot be loaded"),
    "tokenizer_config.json": ("{", r"the tokenizer of tenant 'bad' cannot be loaded"),
    "chat_template.jinja": (
        "{% for m in messages %}",
        r"the chat template of tenant 'bad' does not parse \(line 1",
    ),
    "generation_config.json": (
        '{"eos_token_id": "2"}',
        r"generation_config\.json: field 'eos_token_id' is '2'",
    ),
}


@pytest.mark.parametrize("file", list(BAD))
def test_a_tenant_that_cannot_be_served_does_not_come_in(
    file: str, talking: Path, tmp_path: Path
) -> None:
    content, message = BAD[file]
    bad = copied(talking, tmp_path / "bad")
    (bad / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        build_store(tmp_path / "store", {"good": talking, "bad": bad})
    assert str(bad) in str(refused.value) and not (tmp_path / "store").exists()
    store = build_store(tmp_path / "store", {"good": talking})
    before = helpers.fingerprint(store.path)
    with pytest.raises(CheckpointError, match=message):
        add_tenant(store.path, "bad", bad)
    assert helpers.fingerprint(store.path) == before


def test_a_tenant_damaged_later_leaves_the_others_alone(talking: Path, tmp_path: Path) -> None:
    other = copied(talking, tmp_path / "other")
    edit(other / "tokenizer_config.json", model_max_length=77)  # so that their files differ
    store = build_store(tmp_path / "store", {"good": talking, "bad": other})
    (store.assets_dir("bad") / "tokenizer.json").write_text("{")
    with load_engine(store) as engine:
        assert list(engine.load_texts()) == ["bad"]
        params = SamplingParams(max_new_tokens=2)
        assert engine.generate("good", "the people", params).text is not None
        with pytest.raises(
            TenantUnavailableError, match=r"tenant 'bad' cannot answer this: .*tokenizer"
        ):
            engine.generate("bad", "the people", params)
        # What a prompt of token ids needs is there.
        out = engine.generate("bad", [1, 5, 6], params)
        assert (
            out.text is None
            and out.token_ids == engine.generate("good", [1, 5, 6], params).token_ids
        )


def test_a_store_without_decisions_is_read_as_its_files_say(talking: Path, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", {"t": talking})
    manifest = Manifest.read(store.path)
    replace(manifest, tenants=tuple(replace(t, generation=None) for t in manifest.tenants)).write(
        store.path
    )
    assert Store.open(store.path).generation("t").eos_token_ids == (2,)


def test_an_export_holds_what_was_decided(talking: Path, tmp_path: Path) -> None:
    checkpoint = copied(talking, tmp_path / "checkpoint")
    edit(checkpoint / "generation_config.json", temperature=0.5)
    store = build_store(tmp_path / "store", {"t": checkpoint})
    store.export("t", tmp_path / "export")
    found = TransformersGenerationConfig.from_pretrained(tmp_path / "export")
    assert (
        tuple(found.eos_token_id) == store.generation("t").eos_token_ids
        and found.temperature == 0.5
    )
    again = build_store(tmp_path / "again", {"t": tmp_path / "export"})
    assert again.generation("t") == store.generation("t")


def test_forced_tokens_are_transformers(tmp_path: Path) -> None:
    model = random_switch(4)
    model.generation_config.forced_bos_token_id = 11
    model.generation_config.forced_eos_token_id = 9
    model.generation_config.decoder_start_token_id = 7
    model.save_pretrained(tmp_path / "checkpoint")
    prompt = [5, 9, 33, 1]
    oracle = SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint"
    ).eval()
    ids = torch.tensor([prompt])
    # `max_length` counts the start token; transformers forces the end where an answer reaches it.
    expected = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=6, do_sample=False
    )[0].tolist()
    with load_engine(build_store(tmp_path / "store", {"t": tmp_path / "checkpoint"})) as engine:
        out = engine.generate("t", prompt, SamplingParams(max_new_tokens=5))
        assert [engine.start_id("t"), *out.token_ids] == expected
