"""Reconfiguration and compilation: nothing is compiled on a switch, the pool stays where it is,
shapes are few."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from common import CheckpointError, Engine, SamplingParams, load_engine
from common.serving.backend import Row
from jax_engine.backend import JaxBackend
from jax_engine.steps.buckets import cache_bucket, joint_bucket, power_of_two, prompt_bucket
from jax_engine.steps.compilation import use_compilation_cache
from tests import helpers, switch_models
from tests.helpers import build_round_robin, prompts, rest_slow
from tests.jax_engine.conftest import SwitchFamily

FREE = SamplingParams(max_new_tokens=6, ignore_eos=True)


def backend_of(engine: Engine) -> JaxBackend:
    backend = engine._require_backend()
    assert isinstance(backend, JaxBackend)
    return backend


def pointers(backend: JaxBackend) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in backend.loaded.pool.leaves]


def lowered_decode(backend: JaxBackend, rows: Sequence[Row]) -> Any:
    """A decode step of sequences of one tenant that have been read, ready to compile; and its
    cache."""
    batch = backend.start(rows)
    batch.prefill(want_logits=False)
    (name,) = {row.tenant for row in rows}
    tenant = backend.loaded.ready.acquire([name])[0][name]
    held = backend.sequences.caches.caches[name]
    table = held.table(dict.fromkeys(held.numbers[held.numbers >= 0].tolist(), 5))
    return backend.loaded.steps(tenant)._decode.lower(
        held.cache,
        backend.loaded.pool.leaves,
        tenant.leaves,
        tenant.slot_of,
        tenant.vocab_size,
        backend._devices.rows_given(table),
        held.encoded,
        tenant.residuals,
    ), held.cache


@pytest.mark.slow
@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
@pytest.mark.parametrize("slots", rest_slow([None, "all", 5]))
def test_a_switch_compiles_and_copies_nothing(
    switch_family: SwitchFamily, tmp_path: Path, slots: Any, products: str
) -> None:
    with load_engine(
        build_round_robin(tmp_path / "store", switch_family.paths, slots=slots), products=products
    ) as engine:
        backend, row = backend_of(engine), prompts(0, [9])[0]
        engine.generate("base", row, FREE)
        before, places = engine.stats()["compilations"], pointers(backend)
        assert before > 0
        for name in ("ana", "bob", "base", "bob", "ana"):
            engine.generate(name, row, FREE)
        after = engine.stats()
        assert after["compilations"] == before
        assert pointers(backend) == places
        assert after["reconfigured_bytes"] == 0 and after["reconfigurations"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("products", rest_slow(["auto", "plain"]))
def test_a_compiled_step_copies_no_weights(
    switch_family: SwitchFamily, tmp_path: Path, products: str
) -> None:
    """Its temporary memory is smaller than a single copy; a step that copied the pool would need
    all of it."""
    sizes = {"d_ff": 512, "d_model": 128}
    path = helpers.save(switch_models.random_switch(0, **sizes), tmp_path / "large")
    store = build_round_robin(tmp_path / "store", {"base": path})
    with load_engine(store, products=products) as engine:
        lowered, cache = lowered_decode(backend_of(engine), backend_rows(engine, [[5, 6, 7]]))
        memory = lowered.compile().memory_analysis()
        assert (
            memory.temp_size_in_bytes
            < store.copy_bytes
            < store.plan.num_slots * store.copy_bytes / 4
        )
        assert memory.alias_size_in_bytes >= sum(
            leaf.nbytes for leaf in jax.tree.leaves(cache)
        )  # donated


def backend_rows(engine: Engine, rows: list[list[int]]) -> Any:
    return [Row(engine.tenants[0], tuple(r), 4) for r in rows]


@pytest.mark.slow
def test_shapes_are_rounded_up_so_that_compilations_are_few(
    switch_family: SwitchFamily, tmp_path: Path
) -> None:
    with load_engine(build_round_robin(tmp_path / "store", switch_family.paths)) as engine:
        for length in (3, 16, 9, 1):
            engine.generate(
                "base", prompts(0, [length])[0], SamplingParams(max_new_tokens=30, ignore_eos=True)
            )
        assert (
            engine.stats()["compilations"] == 2
        )  # the encoder at 16, the decoder at 16 and a cache of 32
        engine.generate(
            "base", prompts(0, [17])[0], SamplingParams(max_new_tokens=40, ignore_eos=True)
        )
        # The encoder at 32, the decoder at 32 with caches of 32 and 64, and a move from the one to
        # the other.
        assert engine.stats()["compilations"] == 6
        rows = [("base", r) for r in prompts(0, [4, 5, 6])]
        engine.generate_batch(rows, SamplingParams(max_new_tokens=4, ignore_eos=True))
        engine.generate_batch([*rows, rows[0]], SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert engine.stats()["compilations"] == 8  # encoder and decoder for four rows


def test_buckets() -> None:
    assert [
        prompt_bucket(n) for n in (1, 16, 17, 32, 33, 48, 49, 64, 65, 97, 129, 193, 257, 385)
    ] == [16, 16, 32, 32, 48, 48, 64, 64, 96, 128, 192, 256, 384, 512]
    assert [cache_bucket(n) for n in (1, 32, 33, 65)] == [32, 32, 64, 128]
    assert [power_of_two(n) for n in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
    assert [joint_bucket(n) for n in (1, 8, 9, 17)] == [8, 8, 16, 32]
    for bucket in (prompt_bucket, cache_bucket, joint_bucket, power_of_two):
        sizes = [bucket(n) for n in range(1, 4097)]
        assert all(size >= n for n, size in enumerate(sizes, 1)) and len(set(sizes)) <= 2 * 12
        assert all(a <= b for a, b in itertools.pairwise(sizes))


CACHED = """
import collections, json, sys
import jax
from common import SamplingParams, load_engine
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
options = {} if sys.argv[2] == "auto" else {"compilation_cache": None if sys.argv[2] == "none" else sys.argv[2]}
with load_engine(sys.argv[1], products="plain", **options) as engine:
    engine.generate_batch([("base", [5, 6]), ("ana", [5])], SamplingParams(max_new_tokens=2))
print(json.dumps(events))
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("where", rest_slow(["auto", "named", "none"]))
def test_compiled_steps_are_kept_on_disk(
    switch_family: SwitchFamily, tmp_path: Path, where: str
) -> None:
    """In processes of their own: jax opens its cache once. All of them are kept, also what takes no
    second."""
    build_round_robin(tmp_path / "store", switch_family.paths)
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home")}
    folder = tmp_path / ("mine" if where == "named" else "home/moetel/jax")

    def events() -> dict[str, int]:
        arguments = [str(tmp_path / "store"), str(folder) if where == "named" else where]
        done = subprocess.run(
            [sys.executable, "-c", CACHED, *arguments],
            check=True,
            cwd=helpers.REPOSITORY,
            env=environment,
            timeout=240,
            capture_output=True,
            text=True,
        )
        found: dict[str, int] = json.loads(done.stdout)
        return found

    first = events()
    if where == "none":
        assert not folder.exists() and not first.get("cache_misses")
        return
    kept = {p.name for p in folder.glob("*-cache")}
    assert len(kept) == first["cache_misses"] > 10
    if where == "named":
        return
    again = events()
    assert again["cache_hits"] == again["compile_requests_use_cache"] and not again.get(
        "cache_misses"
    )
    assert {p.name for p in folder.glob("*-cache")} == kept


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [(None, 1.0, 0.0), (None, 0.5, 0.5), ("1", 1.0, 1.0)],
    ids=["jax", "code", "env"],
)
def test_what_the_user_keeps_of_compiled_steps_stays(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str | None,
    value: float,
    expected: float,
) -> None:
    folder, least = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in (folder, least)}
    monkeypatch.delenv(least.upper(), raising=False)
    if variable is not None:
        monkeypatch.setenv(least.upper(), variable)
    try:
        jax.config.update(least, value)
        use_compilation_cache(str(tmp_path))
        assert getattr(jax.config, least) == expected
        # A folder that is the user's is used as the user wants it.
        jax.config.update(least, 1.0)
        monkeypatch.delenv(least.upper(), raising=False)
        use_compilation_cache("auto")
        assert (getattr(jax.config, folder), getattr(jax.config, least)) == (str(tmp_path), 1.0)
    finally:
        for name, old in before.items():
            jax.config.update(name, old)


def test_a_tenant_without_its_own_start_token_takes_the_generation_configs(
    switch_family: SwitchFamily, tmp_path: Path
) -> None:

    other = tmp_path / "other"
    shutil.copytree(switch_family.paths["ana"], other)
    (other / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 7}))
    with load_engine(build_round_robin(tmp_path / "store", {"ana": other})) as engine:
        model = switch_family.models[1]
        before = model.generation_config.decoder_start_token_id
        model.generation_config.decoder_start_token_id = 7
        try:
            expected = switch_models.hf_greedy(model, [5, 6, 9], 6)
        finally:
            model.generation_config.decoder_start_token_id = before
        assert list(engine.generate("ana", [5, 6, 9], FREE).token_ids) == expected
    (other / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 700}))
    with pytest.raises(
        CheckpointError, match=r"field 'decoder_start_token_id' is 700; expected .* from 0 to 95"
    ):
        load_engine(build_round_robin(tmp_path / "store", {"ana": other}))
