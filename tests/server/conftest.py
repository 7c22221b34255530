"""A store of three tenants, small and random: `ana` and `bob` speak in bytes, `bob` chats, `ids`
has no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common import build_store, load_engine
from common.serving.scheduler_options import SchedulerOptions
from scripts.server.settings import Settings
from tests import helpers
from tests.oracle.test_engine import NUM_BASE, byte_tokenizer
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
    with loop.serve(Settings(max_sequences=24)) as live:
        yield live
