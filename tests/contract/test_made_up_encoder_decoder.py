"""A family of encoder-decoders needs one file: this one is made up, and lives in its test.

Neither its fields nor its tensors are named as Switch Transformer's. What it computes is, so that
transformers' Switch Transformer with the same weights says what is right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("transformers")

from safetensors.torch import save_file

from common import SamplingParams, load_engine
from common.families import FAMILIES, EncoderDecoder, ExpertSpec, Family, ModelConfig
from common.families.fields import Fields
from common.families.shape import (
    Attention,
    Experts,
    RelativePositions,
    Router,
    Scalars,
    alternate,
)
from tests.helpers import assert_close, build_round_robin, prompts
from tests.switch_models import Model, hf_greedy, hf_logits, oracle, random_switch, tuned

# What its files call each role. {} is the number of a layer among those of its side.
WHOLE = {
    "embed": "dictionary",
    "encoder_embed": "reader.dictionary",
    "decoder_embed": "writer.dictionary",
    "head": "voice",
    "encoder_norm": "reader.calm",
    "norm": "writer.calm",
}
OF_LAYER = {
    "input_norm": "before_looking",
    "q": "look.ask",
    "k": "look.offer",
    "v": "look.give",
    "o": "look.gather",
    "position_bias": "look.nearness",
    "cross_norm": "before_listening",
    "cross_q": "listen.ask",
    "cross_k": "listen.offer",
    "cross_v": "listen.give",
    "cross_o": "listen.gather",
    "post_norm": "before_thinking",
    "router": "clerk",
    "router_bias": "clerk_leaning",
    "dense_up": "think.open",
    "dense_down": "think.close",
    "up": "open",
    "down": "close",
}


class PostOffice(Family):
    """Sides are called reader and writer, sparse layers sort."""

    name = "post_office"
    title = "Post Office"
    architecture = "PostOfficeModel"
    default_eos_token_id = 1
    read = frozenset(
        "words width desks desk_width rooms sorting clerks shelf near far tiny dictionaries "
        "leaning first_word".split()
    )
    ignored = re.compile(r"^stamp$")

    def parse(self, fields: Fields) -> ModelConfig:
        count, width, inner = (fields.positive_int(n) for n in ("clerks", "width", "shelf"))
        heads = fields.positive_int("desks")
        reader, writer = fields.raw["rooms"]
        layers = alternate([n in fields.raw["sorting"] for n in range(reader + writer)], inner)
        own = tuple(fields.raw["dictionaries"])
        shape = EncoderDecoder(
            vocab_size=fields.positive_int("words"),
            hidden=width,
            max_positions=512,
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=fields.positive_int("desk_width"),
                scale=1.0,
                positions=RelativePositions(
                    fields.positive_int("near"), fields.positive_int("far")
                ),
            ),
            experts=Experts(
                count=count,
                inner=inner,
                activation="relu",
                gated=False,
                router=Router(
                    1, dtype="float32", gates="hidden", bias=fields.flag("leaning", False)
                ),
            ),
            encoder=layers[:reader],
            decoder=layers[reader:],
            norm_eps=fields.number("tiny", 1e-6),
            own_tables=own,
            scalars=Scalars(head_input=1.0 if own else width**-0.5),
            decoder_start_token_id=fields.raw["first_word"],
        )
        experts = ExpertSpec(
            family=self.name,
            expert_layers=tuple(f"room {n}" for n in shape.sparse_layers),
            num_experts=count,
            hidden_size=width,
            intermediate_size=inner,
            activation="relu",
            top_k=1,
            projections=shape.experts.projections(width),
            model_layers=len(layers),
        )
        return ModelConfig(experts, shape, dict(fields.given))

    def tensor_name(
        self, config: ModelConfig, role: str, layer: int | None = None, expert: int | None = None
    ) -> str:
        if layer is None:
            return WHOLE[role]
        assert isinstance(config.shape, EncoderDecoder)
        reader = len(config.shape.encoder)
        room = f"reader.{layer}" if layer < reader else f"writer.{layer - reader}"
        return f"{room}.{OF_LAYER[role]}" if expert is None else f"{room}.{OF_LAYER[role]}@{expert}"


def renamed(model: Model) -> dict[str, Any]:
    """The weights of transformers' model under the made-up names, by rules of their own."""
    rules = (
        (r"^shared\.weight", "dictionary"),
        (r"^lm_head\.weight", "voice"),
        (r"^encoder\.", "reader."),
        (r"^decoder\.", "writer."),
        (r"embed_tokens\.weight", "dictionary"),
        (r"final_layer_norm\.weight", "calm"),
        (r"block\.(\d+)\.", r"\1."),
        (r"layer\.\d\.mlp\.router\.classifier\.weight", "clerk"),
        (r"layer\.\d\.mlp\.router\.classifier\.bias", "clerk_leaning"),
        (r"layer\.\d\.mlp\.experts\.expert_(\d+)\.wi\.weight", r"open@\1"),
        (r"layer\.\d\.mlp\.experts\.expert_(\d+)\.wo\.weight", r"close@\1"),
        (r"layer\.\d\.mlp\.wi\.weight", "think.open"),
        (r"layer\.\d\.mlp\.wo\.weight", "think.close"),
        (r"relative_attention_bias\.weight", "nearness"),
        (r"layer\.0\.layer_norm\.weight", "before_looking"),
        (r"(?<=writer\.\d\.)layer\.1\.layer_norm\.weight", "before_listening"),
        (r"layer\.\d\.layer_norm\.weight", "before_thinking"),
        (r"layer\.0\.SelfAttention\.", "look."),
        (r"layer\.1\.EncDecAttention\.", "listen."),
        (r"\.q\.weight", ".ask"),
        (r"\.k\.weight", ".offer"),
        (r"\.v\.weight", ".give"),
        (r"\.o\.weight", ".gather"),
    )
    found = {}
    for name, value in model.state_dict().items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        found[name] = value.contiguous().clone()
    return found


def save(model: Model, path: Path) -> Path:
    c = model.config
    flags = [block.is_sparse for block in (*model.encoder.block, *model.decoder.block)]
    tied = c.tie_word_embeddings
    tensors = renamed(model)
    if tied:
        for name in ("voice", "reader.dictionary", "writer.dictionary"):
            tensors.pop(name, None)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "post_office",
        "words": c.vocab_size,
        "width": c.d_model,
        "desks": c.num_heads,
        "desk_width": c.d_kv,
        "rooms": [c.num_layers, c.num_decoder_layers],
        "sorting": [n for n, sparse in enumerate(flags) if sparse],
        "clerks": c.num_experts,
        "shelf": c.d_ff,
        "near": c.relative_attention_num_buckets,
        "far": c.relative_attention_max_distance,
        "tiny": c.layer_norm_epsilon,
        "dictionaries": [] if tied else ["encoder_embed", "decoder_embed", "head"],
        "leaning": c.router_bias,
        "first_word": c.decoder_start_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"num_layers": 3, "num_sparse_encoder_layers": 1, "decoder_start_token_id": 5},
    "untied, router bias": {"tie_word_embeddings": False, "router_bias": True},
}


@pytest.mark.parametrize("slots", ["all", None, 3])
@pytest.mark.parametrize("case", SHAPES)
def test_a_family_in_one_file_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, slots: Any
) -> None:
    """Greedy tokens and logits are transformers', alone and with two tenants in a step."""
    monkeypatch.setitem(FAMILIES, "post_office", PostOffice())
    base = random_switch(0, **SHAPES[case])
    models = [base, tuned(base, 1)]
    paths = {name: save(m, tmp_path / name) for name, m in zip(("lea", "tom"), models, strict=True)}
    store = build_round_robin(tmp_path / "store", paths, slots=slots)
    assert store.family.name == "post_office"
    rows = prompts(0, [9, 4, 17])
    greedy = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with load_engine(store) as engine:
        both = engine.generate_batch([(name, row) for name in paths for row in rows], greedy)
        for i, name in enumerate(paths):
            right = oracle(models, i, store.plan)
            expected = [hf_greedy(right, row, 8) for row in rows]
            assert [list(engine.generate(name, row, greedy).token_ids) for row in rows] == expected
            assert [list(g.token_ids) for g in both[3 * i : 3 * i + 3]] == expected
            ids, answers = np.array([rows[0]]), np.array([expected[0]])
            assert_close(engine.logits(name, ids, answers), hf_logits(right, ids, answers))
        assert (engine.stats()["misses"] > 0) == (slots == 3)
