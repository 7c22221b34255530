"""An engine of each family, over tenants with and without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common import (
    Engine,
    load_engine,
)
from tests import helpers
from tests.byte_tokenizer import NUM_BASE, byte_tokenizer
from tests.helpers import build_round_robin
from tests.oracle.serving.kinds import Kind, Mixtral, Switch


@pytest.fixture(scope="module", params=[Mixtral, Switch], ids=lambda kind: kind.__name__)
def chatty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """plain: vocabulary 260; chat: a fine-tune of it with two added tokens; bare: no tokenizer and
    300 tokens."""
    kind: Kind = request.param()
    pytest.importorskip(kind.backend)
    root = tmp_path_factory.mktemp("chatty")
    plain = kind.make(0, NUM_BASE)
    chat = kind.tune(plain, 1)
    chat.resize_token_embeddings(NUM_BASE + 2, mean_resizing=False)
    models = {"plain": plain, "chat": chat, "bare": kind.make(2, 300)}
    kind.models = list(models.values())
    kind.paths = {n: helpers.save(m, root / n) for n, m in models.items()}
    byte_tokenizer([]).save_pretrained(kind.paths["plain"])
    byte_tokenizer(["<user>", "<bot>"]).save_pretrained(kind.paths["chat"])
    return kind


@pytest.fixture(scope="module")
def engine(chatty: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    store = build_round_robin(tmp_path_factory.mktemp("store") / "store", chatty.paths, slots=6)
    with load_engine(store) as engine:
        yield engine
