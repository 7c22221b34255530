"""What `common.serving.backend` promises, held against the fake, the torch and the JAX backend."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from common import EngineError, StoreError
from common.build.scoring import log_softmax
from common.serving.backend import Backend, Part, Row
from tests.contract.backends import NEWCOMER, TENANTS, FakeMade, JaxMade, Made, TorchMade
from tests.helpers import assert_close, prompts, rest_slow
from tests.schedules import (
    Asked,
    advance,
    alone,
    beginning_alike,
    begun,
    check_equal,
    finish,
    requests_of,
    run,
)

PROMISED = {
    "device",
    "dtype",
    "pool_bytes",
    "residual_bytes",
    "non_expert_bytes",
    "hits",
    "misses",
    "fetches",
    "reconfigurations",
    "kv_cache_bytes",
    "kv_cache_used_bytes",
}


def used(backend: Backend) -> int:
    return int(backend.stats()["kv_cache_used_bytes"])


@pytest.fixture(scope="class")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    made_by: type[Made] = request.cls.made_by
    if made_by.framework is not None:
        pytest.importorskip(made_by.framework)
    return made_by(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="class")
def backend(made: Made) -> Iterator[Backend]:
    """One for all tests of a class: each leaves it without sequences."""
    backend = made.load()
    yield backend
    backend.close()


class BackendContract:
    """What holds of every backend. A subclass says of which."""

    made_by: type[Made]

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, backend: Backend) -> Iterator[None]:
        yield
        left = used(backend)
        backend.end(range(1, 10_000))
        assert left == 0

    def test_begin_takes_no_memory_and_computes_nothing(self, backend: Backend) -> None:
        before = backend.stats()
        numbers = [backend.begin(Row(name, (5, 6, 7), 9)) for name in TENANTS * 2]
        assert len(set(numbers)) == len(numbers)
        assert backend.stats() == before
        backend.end(numbers)

    @pytest.mark.parametrize("tenant", TENANTS)
    def test_alone_a_sequence_gets_what_its_tenant_answers(
        self, made: Made, backend: Backend, tenant: str
    ) -> None:
        (prompt,) = prompts(1, [9])
        (asked,) = alone(backend, [Asked(tenant, prompt, 5)])
        assert asked.answer == made.answer(tenant, prompt, 5)

    @pytest.mark.parametrize("seed", rest_slow(range(4)))
    def test_others_in_the_step_and_cuts_of_the_reading_change_nothing(
        self, backend: Backend, seed: int
    ) -> None:
        expected = alone(backend, requests_of(TENANTS, seed, 5, longest=14, answer=6))
        found = requests_of(TENANTS, seed, 5, longest=14, answer=6)
        run(backend, found, seed)
        check_equal(found, expected)

    def test_a_sequence_that_is_left_out_waits(self, backend: Backend) -> None:
        waits, goes = (
            begun(backend, n, p, 6) for n, p in zip(TENANTS, prompts(2, [8, 5]), strict=False)
        )
        for _ in range(3):
            advance(backend, [(goes, 0)])
        assert len(waits.answer) == 1
        advance(backend, [(goes, 0), (waits, 0)])
        for asked in (waits, goes):
            answer = finish(backend, asked)
            assert answer == alone(backend, [Asked(asked.tenant, asked.prompt, 6)])[0].answer

    def test_no_token_while_there_is_more_to_read_and_logits_where_asked(
        self, backend: Backend
    ) -> None:
        rows = prompts(3, [7, 4])
        long, short = (
            backend.begin(Row(n, tuple(r), 3)) for n, r in zip(TENANTS, rows, strict=False)
        )
        step = backend.step([Part(long, 3, want_logits=True), Part(short, 4)])
        assert step.token_ids.dtype == np.int64 and step.token_ids[0] == -1 < step.token_ids[1]
        assert step.logits == [None, None]
        following = int(step.token_ids[1])
        step = backend.step([Part(short, token_id=following), Part(long, 4, want_logits=True)])
        assert (step.token_ids >= 0).all() and step.logits[0] is None
        values = step.logits[1]
        assert values is not None and values.dtype == np.float32 and values.ndim == 1
        assert values.argmax() == step.token_ids[1]
        backend.end([long, short])
        # Asked for logits or not, the tokens are the same.
        asked = [Asked(n, r, k) for n, r, k in zip(TENANTS, rows, (1, 2), strict=False)]
        answers = [one.answer for one in alone(backend, asked)]
        assert answers == [[step.token_ids[1]], [following, step.token_ids[0]]]

    def test_an_answer_that_was_given_up_is_read_again(self, backend: Backend) -> None:
        (prompt,) = prompts(4, [6])
        (whole,) = alone(backend, [Asked("ana", prompt, 7)])
        again = Asked("ana", prompt, 7, whole.answer[:4])
        again.begin(backend)
        advance(backend, [(again, again.unread - 1)])
        assert again.unread == 1 and len(again.answer) == 4
        assert finish(backend, again) == whole.answer

    def test_end_frees_caches_and_passes_over_unknown_numbers(self, backend: Backend) -> None:
        first, second = (begun(backend, n, prompts(5, [20])[0], 4) for n in ("ana", "bob"))
        both = used(backend)
        backend.end([first.number or 0, 10**9])
        assert 0 < used(backend) < both
        backend.end([first.number or 0, second.number or 0])
        assert used(backend) == 0

    def test_what_fits_runs(self, made: Made, backend: Backend) -> None:
        """Sequences take all the room there is; some are put off for others."""
        small = made.load(small=True)
        most, refused, rng = small.stats()["kv_cache_bytes"], 0, random.Random(0)
        asked = requests_of(TENANTS, 6, 7, longest=14, answer=8)
        while going := [a for a in asked if not a.is_done]:
            chosen = rng.sample(going, rng.randint(1, len(going)))
            for one in chosen:
                if one.number is None:
                    one.begin(small)
            parts = [(a, rng.randint(1, a.unread) if a.unread else 0) for a in chosen]
            while not small.fits([a.part(read) for a, read in parts]):
                refused += 1
                if len(parts) > 1:
                    parts.pop()
                    continue
                for other in going:  # it fits if it has all the caches
                    if other is not parts[0][0] and other.number is not None:
                        small.end([other.number])
                        other.number = None
                assert small.fits([a.part(read) for a, read in parts])
            advance(small, parts)
            assert 0 < used(small) <= most
            for one in asked:
                if one.is_done and one.number is not None:
                    small.end([one.number])
                    one.number = None
        assert refused > 0 and used(small) == 0
        small.close()
        for one in asked:
            assert (
                one.answer == alone(backend, [Asked(one.tenant, one.prompt, one.count)])[0].answer
            )

    def test_room_ahead_is_there(self, made: Made) -> None:
        small = made.load(small=True)
        first = Asked("ana", prompts(7, [6])[0], 10**6)
        first.begin(small)
        fits = [n for n in range(200) if small.fits([first.part(6)], ahead=n)]
        assert fits == list(range(len(fits))) and 1 < len(fits) < 200
        advance(small, [(first, 6)])
        for _ in range(fits[-1]):
            assert small.fits([first.part(0)])
            advance(small, [(first, 0)])
        small.end([first.number or 0])
        short = Asked("ana", [5, 6], 1)
        short.begin(small)
        assert small.fits([short.part(2)], ahead=10**6), "no farther than the answer may come"
        small.close()

    def test_the_longest_sequence_has_room(self, made: Made) -> None:
        small = made.load(small=True)
        length, both = small.max_length("bob"), small.start_id("bob") is None
        asked = Asked("bob", prompts(8, [length - 4 if both else length])[0], 4 if both else length)
        asked.begin(small)
        while not asked.is_done:
            assert small.fits([asked.part(asked.unread)])
            advance(small, [(asked, asked.unread)])
        small.close()

    def test_as_many_tenants_as_are_ready_share_steps(self, made: Made, backend: Backend) -> None:
        few = made.load(ready=2)
        assert few.max_ready_tenants == 2
        asked = [Asked(n, p, 4) for n, p in zip(TENANTS, prompts(9, [5, 6, 7]), strict=True)]
        for one in asked:
            one.begin(few)
        counted = 0
        last: set[str] = set()
        for turn in range(12):
            pair = [a for i, a in enumerate(asked) if i != turn // 2 % 3 and not a.is_done]
            if not pair:
                continue
            took = advance(few, [(a, a.unread) for a in pair])
            names = {a.tenant for a in pair}
            assert set(took) <= names - last, "tenants in use already take no time"
            counted += len(took)
            last = names
        assert few.stats()["reconfigurations"] == counted >= 3
        for one in asked:
            assert finish(few, one) == alone(backend, [Asked(one.tenant, one.prompt, 4)])[0].answer
        few.close()

    def test_a_hint_changes_no_answer(self, made: Made, backend: Backend) -> None:
        asked = begun(backend, "ana", prompts(1, [9])[0], 5)
        backend.prefetch(["bob", "base"])
        assert finish(backend, asked) == made.answer("ana", asked.prompt, 5)

    def test_logits_at_every_position(self, backend: Backend) -> None:
        (asked,) = alone(backend, [Asked("ana", prompts(2, [6])[0], 4)])
        start = backend.start_id("ana")
        if start is None:
            rows = [[*asked.prompt, *asked.answer[:-1]], asked.prompt[:2]]
            found = backend.logits("ana", rows, None)
        else:
            rows = [[start, *asked.answer[:-1]], [start]]
            found = backend.logits("ana", [asked.prompt, asked.prompt[:2]], rows)
        vocab = len(asked.logits[0])
        assert [values.shape for values in found] == [(len(row), vocab) for row in rows]
        assert all(values.dtype == np.float32 for values in found)
        assert_close(found[0][-4:], np.stack(asked.logits))

    def test_start_id(self, backend: Backend) -> None:
        for name in TENANTS:
            start = backend.start_id(name)
            (values,) = backend.logits(name, [[5]], None if start is None else [[start]])
            assert start is None or 0 <= start < values.shape[1]

    def test_an_observer_sees_every_look_up_and_adds_to_the_layers(self, backend: Backend) -> None:
        (before,) = alone(backend, [Asked("ana", prompts(3, [7])[0], 3)])
        rng = np.random.default_rng(0)
        seen: list[tuple[str, int, int]] = []

        def observer(name: str, layer: int, x: Any, ids: Any, gates: Any) -> np.ndarray | None:
            assert x.dtype == gates.dtype == np.float32 and ids.dtype == np.int64
            assert len(x) == len(ids) and x.ndim == 2 and ids.shape == gates.shape
            seen.append((name, layer, ids.size))
            return rng.normal(0, 30, x.shape).astype(np.float32) if adds else None

        backend.observe(observer)
        adds = False
        asked = [Asked(n, p, 3) for n, p in zip(TENANTS, prompts(3, [7, 4, 5]), strict=True)]
        for one in asked:
            one.begin(backend)
        advance(backend, [(a, a.unread) for a in asked])
        advance(backend, [(a, 0) for a in asked])
        assert {name for name, _, _ in seen} == set(TENANTS)
        assert len({layer for _, layer, _ in seen}) == 1 + max(layer for _, layer, _ in seen)
        for one in asked:
            shown = sum(size for name, _, size in seen if name == one.tenant)
            assert shown == one.hits + one.misses
        adds = True
        (changed,) = alone(backend, [Asked("ana", before.prompt, 3)])
        assert np.abs(changed.logits[0] - before.logits[0]).max() > 0.1
        backend.observe(None)
        count = len(seen)
        for one in asked:
            finish(backend, one)
        assert len(seen) == count
        check_equal(alone(backend, [Asked("ana", before.prompt, 3)]), [before])

    def test_a_step_that_fails_harms_no_other_sequence(self, backend: Backend) -> None:
        good, bad = (begun(backend, "ana", p, 5) for p in prompts(4, [6, 5]))

        def fail(*_: Any) -> None:
            raise RuntimeError("no")

        backend.observe(fail)
        with pytest.raises(RuntimeError, match="no"):
            backend.step([bad.part(0)])
        backend.observe(None)
        backend.end([bad.number or 0])
        assert finish(backend, good) == alone(backend, [Asked("ana", good.prompt, 5)])[0].answer

    def test_stats_have_what_is_promised_and_count(self, backend: Backend) -> None:
        before = backend.stats()
        assert before.keys() >= PROMISED
        assert all(before[key] >= 0 for key in PROMISED - {"device", "dtype"})
        (asked,) = alone(backend, [Asked("bob", prompts(5, [8])[0], 3)])
        after = backend.stats()
        assert asked.hits + asked.misses > 0
        assert after["hits"] - before["hits"] == asked.hits
        assert after["misses"] - before["misses"] == asked.misses

    def test_update_keeps_sequences_and_serves_who_came(self, made: Made, backend: Backend) -> None:
        running = made.load()
        asked = begun(running, "ana", prompts(6, [9])[0], 8)
        unread = Asked("bob", prompts(6, [9])[0], 4)
        unread.begin(running)
        advance(running, [(unread, 5)])
        running.update(made.more)
        came = begun(running, NEWCOMER, asked.prompt, 4)
        advance(running, [(asked, 0), (unread, 4), (came, 0)])
        for one in (asked, unread):
            expected = alone(backend, [Asked(one.tenant, one.prompt, one.count)])
            finish(running, one)
            check_equal([one], expected)
        finish(running, came)
        fresh = made.load()
        fresh.update(made.more)
        check_equal([came], alone(fresh, [Asked(NEWCOMER, came.prompt, 4)]))
        for one in (running, fresh):
            assert used(one) == 0
            one.close()

    def test_update_reads_no_weight_that_is_there(self, made: Made) -> None:
        whole = made.load(slots=None)
        asked = begun(whole, "base", prompts(7, [6])[0], 5)
        (other,) = alone(whole, [Asked("base", asked.prompt, 5)])
        with made.without_reading(slots=None) as store:
            whole.update(store)
        assert finish(whole, asked) == other.answer
        whole.close()

    def test_a_refused_update_changes_nothing(self, made: Made, backend: Backend) -> None:
        asked = begun(backend, "ana", prompts(8, [6])[0], 5)
        before = backend.stats()
        for store in made.refused:
            with pytest.raises((StoreError, EngineError)):
                backend.update(store)
            assert backend.stats() == before
        assert finish(backend, asked) == made.answer("ana", asked.prompt, 5)

    def test_closing_twice_is_safe(self, made: Made) -> None:
        closed = made.load()
        begun(closed, "ana", [5, 6, 7], 3)
        closed.close()
        closed.close()


class PrefixCacheContract(BackendContract):
    """What holds of backends that keep the beginnings of prompts."""

    def prompt(self, backend: Backend, blocks: int, more: int = 1) -> list[int]:
        """So many blocks and some tokens, other ones each time."""
        assert backend.prefix_block is not None
        self.__class__.seed += 1
        return prompts(self.seed, [blocks * backend.prefix_block + more])[0]

    seed = 1000

    def test_a_beginning_is_found_by_its_tenant_alone(self, made: Made, backend: Backend) -> None:
        block = backend.prefix_block or 0
        prompt = self.prompt(backend, 2)
        first = begun(backend, "ana", prompt, 4)
        assert first.found == 0
        for name in ("bob", "base"):
            other = begun(backend, name, prompt, 4)
            assert other.found == 0
            assert finish(backend, other) == made.answer(name, prompt, 4)
        again = begun(backend, "ana", prompt, 4)
        assert again.found == 2 * block
        expected = made.answer("ana", prompt, 4)
        assert finish(backend, first) == finish(backend, again) == expected
        check_equal([again], [first])

    def test_it_is_found_with_another_end_and_after_its_sequence_has_gone(
        self, made: Made, backend: Backend
    ) -> None:
        block = backend.prefix_block or 0
        prompt = self.prompt(backend, 3)
        finish(backend, begun(backend, "ana", prompt, 3))
        assert used(backend) == 0 < backend.stats()["kv_cache_cached_bytes"]
        for length, found in ((3 * block, 2), (2 * block + 1, 2), (block + 3, 1), (block, 0)):
            end = 3 + prompt[length - 1] % 90
            other = begun(backend, "ana", [*prompt[: length - 1], end], 3)
            assert other.found == found * block
            assert finish(backend, other) == made.answer("ana", other.prompt, 3)

    def test_answers_are_found_by_what_goes_on_from_them(
        self, made: Made, backend: Backend
    ) -> None:
        block = backend.prefix_block or 0
        prompt = self.prompt(backend, 1, block - 2)
        answered = finish(backend, begun(backend, "bob", prompt, 6))
        more = begun(backend, "bob", [*prompt, *answered, 9, 8], 3)
        assert more.found == 2 * block
        assert finish(backend, more) == made.answer("bob", more.prompt, 3)

    def test_what_was_preempted_finds_its_blocks_again(self, backend: Backend) -> None:
        block = backend.prefix_block or 0
        (whole,) = alone(backend, [Asked("ana", self.prompt(backend, 2), 5)])
        again = Asked("ana", whole.prompt, 5, whole.answer[:3])
        again.begin(backend)
        assert again.found == 2 * block and again.unread == 1 + 3
        assert finish(backend, again) == whole.answer

    def test_rows_may_ask_for_neither_and_salts_keep_apart(self, backend: Backend) -> None:
        prompt = tuple(self.prompt(backend, 2))

        def found(**more: Any) -> int:
            number = backend.begin(Row("ana", prompt, 1, **more))
            tokens = backend.cached(number)
            backend.step([Part(number, read=len(prompt) - tokens)])
            backend.end([number])
            return tokens

        assert found(cache_prefix=False) == 0 == found()
        assert found(cache_prefix=False) == 0 < found()
        assert found(cache_salt="x") == 0 < found(cache_salt="x")
        assert found(cache_salt="y") == 0

    def test_what_was_found_takes_no_room_twice(self, made: Made, backend: Backend) -> None:
        small = made.load(small=True)
        prompt = self.prompt(backend, 2)
        room = int(small.stats()["kv_cache_bytes"])
        first = begun(small, "ana", prompt, 1)
        one = used(small) // 3
        others = []
        while True:
            asked = Asked("ana", prompt, 1)
            asked.begin(small)
            others.append(asked)
            assert asked.unread == 1
            if not small.fits([asked.part(1)]):
                break
            advance(small, [(asked, 1)])
            assert used(small) == (3 + len(others)) * one
        assert len(others) == room // one - 3 + 1
        small.end(a.number or 0 for a in (first, *others))
        assert used(small) == 0
        small.close()

    def test_room_that_nobody_has_is_given_to_others(self, made: Made, backend: Backend) -> None:
        small = made.load(small=True)
        room = small.max_length("ana")
        kept = begun(small, "ana", self.prompt(backend, 1), 1)
        for _ in range(3):
            full = Asked("bob", prompts(self.seed, [room - kept.row().unread - 4])[0], 2)
            self.__class__.seed += 1
            full.prompt = full.prompt[: room // 2 - 2]
            full.begin(small)
            assert full.found == 0 and small.fits([full.part(full.unread)])
            expected = made.answer("bob", full.prompt, 2)
            assert finish(small, full) == expected
        assert begun(small, "ana", kept.prompt, 1).found > 0, "it is in use"
        small.close()

    def test_nothing_of_before_an_update_is_found(self, made: Made, backend: Backend) -> None:
        running = made.load()
        prompt = self.prompt(backend, 2)
        goes_on = begun(running, "ana", prompt, 6)
        finish(running, begun(running, "bob", prompt, 2))
        running.update(made.more)
        for name in (*TENANTS, NEWCOMER):
            assert begun(running, name, prompt, 1).found == 0
        assert finish(running, goes_on) == made.answer("ana", prompt, 6)
        assert begun(running, NEWCOMER, prompt, 1).found > 0
        running.close()

    def test_a_failed_step_leaves_nothing(self, made: Made) -> None:
        failing = made.load()
        prompt = self.prompt(failing, 2)
        asked = Asked("ana", prompt, 2)
        asked.begin(failing)

        def fail(*_: Any) -> None:
            raise RuntimeError("no")

        failing.observe(fail)
        with pytest.raises(RuntimeError, match="no"):
            failing.step([asked.part(asked.unread)])
        failing.observe(None)
        failing.end([asked.number or 0])
        again = begun(failing, "ana", prompt, 2)
        assert again.found == 0 and finish(failing, again) == made.answer("ana", prompt, 2)
        failing.close()

    @pytest.mark.parametrize("seed", rest_slow(range(6)))
    def test_random_schedules_give_the_same_with_it_and_without(
        self, made: Made, backend: Backend, seed: int
    ) -> None:
        """Sequences that begin alike join, wait, are preempted and begun again, in caches that are
        full at times."""
        without = made.load(enable_prefix_caching=False)
        assert without.prefix_block is None
        asked = beginning_alike(TENANTS, seed, 14, backend.prefix_block or 0)
        expected = alone(without, asked)
        assert not any(one.found for one in expected)
        run(backend, asked, seed)
        check_equal(asked, expected)
        assert any(one.found for one in asked)
        without.close()


class DecoderContract(PrefixCacheContract):
    """What holds of backends whose answers go on from the prompt."""

    @pytest.mark.parametrize("seed", rest_slow(range(4)))
    def test_prompts_get_their_log_probabilities_however_they_are_cut(
        self, backend: Backend, seed: int
    ) -> None:
        rng = random.Random(seed)
        rows = prompts(2000 + seed, [1, 2, 19, 40])
        asked = [Asked(rng.choice(TENANTS), row, 3) for row in rows]
        top = {a: rng.choice([0, 1, 5]) for a in map(id, asked)}
        found: dict[int, list[Any]] = {id(a): [] for a in asked}
        for one in asked:
            one.begin(backend)
        while going := [a for a in asked if a.unread]:
            chosen = rng.sample(going, rng.randint(1, len(going)))
            parts = [
                Part(a.number or 0, rng.randint(1, a.unread), prompt_logprobs=top[id(a)])
                for a in chosen
            ]
            step = backend.step(parts)
            assert set(step.prompt_logprobs) == set(range(len(parts)))
            for i, (one, part) in enumerate(zip(chosen, parts, strict=True)):
                one.unread -= part.read
                found[id(one)] += step.prompt_logprobs[i].tokens()
                if not one.unread:
                    one.answer.append(int(step.token_ids[i]))
        for one in asked:
            (values,) = backend.logits(one.tenant, [one.prompt], None)
            expected = log_softmax(values[:-1])
            tokens = found[id(one)]
            assert [t.token_id for t in tokens] == one.prompt[1:]
            for token, scores in zip(tokens, expected, strict=True):
                assert token.logprob == pytest.approx(scores[token.token_id], abs=1e-4)
                higher = int((scores > scores[token.token_id] + 1e-4).sum())
                assert higher < token.rank <= int((scores > token.logprob - 1e-4).sum())
                best = sorted(scores, reverse=True)[: top[id(one)]]
                assert [p for _, p in token.top] == pytest.approx(best, abs=1e-4)
                assert all(scores[i] == pytest.approx(p, abs=1e-4) for i, p in token.top)
            assert (
                finish(backend, one) == alone(backend, [Asked(one.tenant, one.prompt, 3)])[0].answer
            )

    def test_only_who_asks_gets_them(self, backend: Backend) -> None:
        rows = prompts(2100, [5, 6])
        numbers = [backend.begin(Row("ana", tuple(row), 2)) for row in rows]
        step = backend.step([Part(numbers[0], 5), Part(numbers[1], 6, prompt_logprobs=0)])
        assert set(step.prompt_logprobs) == {1}
        assert len(step.prompt_logprobs[1].token_ids) == 5
        assert step.logits == [None, None]
        backend.end(numbers)


class TestFake(DecoderContract):
    made_by = FakeMade


class TestTorch(DecoderContract):
    made_by = TorchMade


class TestJax(BackendContract):
    made_by = JaxMade

    def test_it_keeps_no_beginnings_and_says_so(self, made: Made, backend: Backend) -> None:
        assert backend.prefix_block is None
        with pytest.raises(EngineError, match="no option 'enable_prefix_caching'"):
            made.load(enable_prefix_caching=True)
