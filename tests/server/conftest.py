"""A store of three tenants, small and random: `ana` and `bob` speak in bytes, `bob` chats, `ids`
has no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common import build_store, load_engine
from common.serving.scheduler_options import SchedulerOptions
from scripts.server.settings import ServerSettings
from tests import helpers
from tests.byte_tokenizer import NUM_BASE, byte_tokenizer
from tests.server import speech
from tests.server.live import Live, Loop

CONTEXT = 4096


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ana, bob, ids, and a fourth, `new`, for loading while the server runs."""
    root = tmp_path_factory.mktemp("tenants")
    extra = ["<user>", "<bot>"]
    base = helpers.random_mixtral(
        0, vocab_size=NUM_BASE + len(extra), max_position_embeddings=CONTEXT
    )
    found = {}
    for seed, name in enumerate(("ana", "bob", "ids", "new")):
        found[name] = helpers.save(helpers.tuned(base, seed), root / name)
        if name != "ids":
            byte_tokenizer(extra if name in ("bob", "new") else []).save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def store_path(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "store"
    build_store(
        path, {n: checkpoints[n] for n in ("ana", "bob", "ids")}, policy="round_robin", slots=6
    )
    return path


@pytest.fixture(scope="session")
def four_tenants(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all four."""
    path = tmp_path_factory.mktemp("four") / "store"
    build_store(path, checkpoints, policy="round_robin", slots=6)
    return path


@pytest.fixture(scope="session")
def loop(store_path: Path) -> Iterator[Loop]:
    """An engine in an event loop, for all tests."""
    engine = load_engine(
        store_path, device="cpu", scheduler=SchedulerOptions(max_num_seqs=8, max_queue=24)
    )
    loop = Loop(engine)
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def live(loop: Loop) -> Iterator[Live]:
    """A server without keys or limits."""
    with loop.serve(ServerSettings(max_sequences=24)) as live:
        yield live


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tenants whose tokenizers add <s>; `docs` reads documents and variables, `warm` has a
    generation config."""
    root = tmp_path_factory.mktemp("speakers")
    base = helpers.random_mixtral(3, vocab_size=speech.VOCAB, max_position_embeddings=256)
    found = {}
    documents = (
        "{% for d in documents or [] %}[{{ d.title }}]{% endfor %}{{ mood }}{{ reasoning_effort }}"
        + speech.CHATML
    )
    for seed, (name, template) in enumerate(
        {"words": speech.CHATML, "docs": documents, "warm": speech.CHATML}.items()
    ):
        found[name] = helpers.save(helpers.tuned(base, seed), root / name)
        speech.metaspace(template).save_pretrained(found[name])
    config = json.loads((found["warm"] / "generation_config.json").read_text())
    config |= {
        "temperature": 0.5,
        "top_k": 1,
        "max_new_tokens": 5,
        "num_beams": 4,
        "do_sample": True,
    }
    (found["warm"] / "generation_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def speaking(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    store = tmp_path_factory.mktemp("speaking") / "store"
    build_store(store, paths)
    loop = Loop(load_engine(store, device="cpu"))
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def words(speaking: Loop) -> Iterator[Live]:
    with speaking.serve() as live:
        yield live


@pytest.fixture(scope="module")
def hf(paths: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(paths["words"])
