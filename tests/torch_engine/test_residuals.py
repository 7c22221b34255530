"""Residuals, merged copies and the observer, against Hugging Face models that hold what the store
serves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import SamplingParams, load_engine
from common.plan.residual import LOW_RANK, LOW_RANK_BITS, SIGN, Part, Residual, part_matrix
from common.store import Store
from common.store.change import set_plan
from tests import helpers
from tests.conftest import Family
from tests.helpers import assert_close, hf_greedy, hf_logits, rest_slow
from torch_engine import native
from torch_engine.experts import residuals
from torch_engine.experts.own import KernelPool, laid_out
from torch_engine.experts.residuals import add_part

NEW = SamplingParams(max_new_tokens=8, ignore_eos=True)
DTYPES = [torch.bfloat16, torch.float32]
WAYS: list[dict[str, Any]] = [
    {"products": "auto"},  # our own kernels, where they work
    {"products": "plain"},
    {"experts": "grouped", "products": "plain"},
]
PROJECTIONS = ("gate", "down", "up")
EVERY_KIND = [
    (SIGN, 1, 1),
    (SIGN, 1, 5),
    (SIGN, 1, 1000),
    *((LOW_RANK, bits, 3) for bits in LOW_RANK_BITS),
]


def kernels(dtype: torch.dtype) -> native.Kernels:
    found = native.load(dtype)
    if found is None:
        pytest.skip(f"no kernels for {dtype} here: see native.load for what they need")
    return found


def noise(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def exact_matrices(
    parts: Sequence[Part], shapes: dict[str, tuple[int, ...]], record: np.ndarray
) -> dict[str, torch.Tensor]:
    """A residual's matrices in float64."""
    residual = Residual(0, 0, 0, tuple(parts))
    exact = {p: torch.zeros(shape, dtype=torch.float64) for p, shape in shapes.items()}
    for part, offset in zip(parts, residual.offsets(shapes), strict=False):
        matrix = part_matrix(record[offset:], part, shapes[part.projection])
        exact[part.projection] += torch.from_numpy(matrix).double()
    return exact


def one_expert(
    parts: Sequence[Part], hidden: int, inner: int, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """A random expert with a residual: by our own kernels, and in float64."""
    own = kernels(dtype)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    weights = {
        p: (noise(i, *s) * s[1] ** -0.5).to(dtype) for i, (p, s) in enumerate(shapes.items())
    }
    record = helpers.random_record(parts, shapes, 0, 0.3)
    beside = laid_out({1: (Residual(0, 0, 0, tuple(parts)), record)}, 2, shapes)
    packed = [native.pack(weights[p]) for p in residuals.PROJECTIONS]
    sums = {
        p: weights[p].double() + more for p, more in exact_matrices(parts, shapes, record).items()
    }

    def found(x: torch.Tensor) -> torch.Tensor:
        chosen = np.ones((len(x), 1), dtype=np.int32)
        gates, at = torch.ones(len(x), 1), native.addresses(packed)[None]
        return native.experts(own, x, chosen, gates, at, inner, "silu", beside)

    def exact(x: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        return (F.silu(wide @ sums["gate"].T) * (wide @ sums["up"].T)) @ sums["down"].T

    return found, exact


# ---- products of one matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "bits", "size"), EVERY_KIND)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(1, 1), (3, 17), (16, 16), (64, 32), (66, 31), (77, 45), (130, 100), (257, 64)],
)
def test_own_kernels_multiply_every_kind_at_any_size(
    dtype: torch.dtype, kind: str, bits: int, size: int, outputs: int, inputs: int
) -> None:
    parts = [Part(projection, kind, bits, size) for projection in PROJECTIONS]
    found, exact = one_expert(parts, outputs, inputs, dtype)
    tolerance = 0.02 if dtype == torch.bfloat16 else 2e-5
    for rows in (1, 2, 3, 4, 5, 7, 19):
        x = noise(rows, rows, outputs).to(dtype)
        expected = exact(x)
        torch.testing.assert_close(
            found(x).double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_whatever_it_is_computed_with(dtype: torch.dtype) -> None:
    parts = [
        Part("gate", SIGN, 1, 3),
        *(Part("gate", LOW_RANK, bits, 21) for bits in LOW_RANK_BITS),
    ]
    parts += [Part("down", SIGN, 1, 2), Part("down", SIGN, 1, 5), Part("down", LOW_RANK, 4, 9)]
    found, _ = one_expert(parts, 70, 150, dtype)
    x = noise(0, 23, 70).to(dtype)
    together = found(x)
    for row in range(23):
        assert torch.equal(together[row : row + 1], found(x[row : row + 1]))


@pytest.mark.parametrize("chunk", [1 << 20, 100])
@pytest.mark.parametrize(("kind", "bits", "size"), EVERY_KIND)
def test_plain_operations_multiply_every_kind(
    kind: str, bits: int, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA and without our kernels; a chunk of 100 numbers is a row or two."""
    monkeypatch.setattr(residuals, "CHUNK", chunk)
    for outputs, inputs in ((1, 1), (66, 31), (77, 45)):
        shapes = {"gate": (outputs, inputs)}
        part = Part("gate", kind, bits, size)
        record = helpers.random_record([part], shapes, 1, 0.3)
        x, y = noise(3, 5, inputs), noise(4, 5, outputs)
        expected = (
            y.double()
            + x.double() @ torch.from_numpy(part_matrix(record, part, shapes["gate"])).double().T
        )
        add_part(part, torch.from_numpy(record), shapes["gate"], x, y)
        torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 2, 40), (5, 1, 70), (40, 3, 40)])
def test_a_whole_layer_adds_residuals_of_several_tenants(
    dtype: torch.dtype, threads: int, tokens: int, top_k: int, hidden: int
) -> None:
    """Rows of three tenants share experts; one tenant has none, the others' differ in parts at
    every expert."""
    own = kernels(dtype)
    inter, num_experts, num_tenants = 61, 4, 3
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    experts = [
        {p: (noise(9 * e + i, *shapes[p]) * 0.2).to(dtype) for i, p in enumerate(PROJECTIONS)}
        for e in range(num_experts)
    ]
    packed = [[native.pack(e[p]) for p in residuals.PROJECTIONS] for e in experts]
    kinds = [
        [Part("gate", SIGN, 1, 1), Part("down", SIGN, 1, 7)],
        [
            Part("down", LOW_RANK, 4, 5),
            Part("up", LOW_RANK, 16, 9),
            Part("down", LOW_RANK, 2, 13),
            Part("up", SIGN, 1, 2),
        ],
        [Part("up", LOW_RANK, 8, 1)],
        [Part("down", LOW_RANK, 32, 2)],
    ]
    made = {}
    rows = {}
    for tenant in range(1, num_tenants):
        for e in range(num_experts):
            parts, number = kinds[(e + tenant) % 4], tenant * num_experts + e
            record = helpers.random_record(parts, shapes, 7 * e + tenant, 0.1)
            rows[number] = Residual(0, 0, 0, tuple(parts)), record
            made[tenant, e] = exact_matrices(parts, shapes, record)
    rng = np.random.default_rng(0)
    x = noise(3, tokens, hidden).to(dtype)
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
    tenant_of = np.sort(rng.integers(0, num_tenants, size=tokens))[:, None].repeat(top_k, axis=1)
    if tokens == 1:
        tenant_of[:] = 1
    gates = torch.from_numpy(rng.random((tokens, top_k), dtype=np.float32))
    chosen = (tenant_of * num_experts + ids).astype(np.int32)
    weights = np.stack([native.addresses(matrices) for matrices in packed])
    beside = laid_out(rows, num_tenants * num_experts, shapes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = native.experts(own, x, chosen, gates, weights, inter, "silu", beside)
    finally:
        torch.set_num_threads(before)
    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for choice in range(top_k):
            e = int(ids[t, choice])
            more = made.get((int(tenant_of[t, 0]), e), {})
            w = {p: m.double() + more.get(p, 0) for p, m in experts[e].items()}
            inner = F.silu(w["gate"] @ x[t].double()) * (w["up"] @ x[t].double())
            exact[t] += gates[t, choice].double() * (w["down"] @ inner)
    tolerance = (
        {"atol": 0.04, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 1e-5}
    )
    torch.testing.assert_close(out.double(), exact, **tolerance)


# ---- the engine

CASES: dict[str, Callable[[int, int, int], Sequence[Part]]] = {
    "sign everywhere": lambda t, _l, _e: [Part(p, SIGN, 1, 1) for p in PROJECTIONS],
    "scales for 7 rows": lambda t, _l, _e: [Part(p, SIGN, 1, 7) for p in PROJECTIONS],
    "a scale for all rows": lambda t, _l, _e: [Part(p, SIGN, 1, 10**6) for p in PROJECTIONS],
    **{
        f"low rank, {bits} bits": lambda t, _l, e, bits=bits: [
            Part(p, LOW_RANK, bits, 1 + e) for p in PROJECTIONS
        ]
        for bits in LOW_RANK_BITS
    },
    "several parts": lambda t, _l, _e: [
        Part("down", LOW_RANK, 8, 2),
        Part("gate", SIGN, 1, 4),
        Part("gate", LOW_RANK, 4, 5),
        Part("down", LOW_RANK, 2, 11),
        Part("gate", LOW_RANK, 16, 1),
    ],
    "some projections, tenants and experts": lambda t, layer, e: (
        [Part(PROJECTIONS[(t + e) % 3], *EVERY_KIND[(2 * t + e) % len(EVERY_KIND)])]
        if (t + layer + e) % 2
        else []
    ),
    "one layer alone": lambda t, layer, _e: [Part("up", SIGN, 1, 2)] if layer == 1 else [],
}


def prepared(
    path: Path, paths: dict[str, Path], case: str, slots: Any = None, merged: bool = True
) -> Store:
    """A store whose plan has residuals and, on every second copy, merged weights."""
    store = helpers.build_round_robin(path, paths, slots=slots)
    plan, means = helpers.with_merged(store, range(0, store.plan.num_slots, 2) if merged else ())
    plan, records = helpers.with_residuals(plan, dict(store.experts.projections), CASES[case])
    return set_plan(path, plan, merged=means, records=records)


def check(
    store: Store, models: Sequence[Any], ways: Sequence[dict[str, Any]], lengths: Sequence[int]
) -> None:
    """Logits of each tenant alone, and greedy tokens in batches of one tenant and of all."""
    oracles = [helpers.oracle_of_store(store, models, i) for i in range(len(models))]
    rows = helpers.prompts(5, lengths, models[0].config.vocab_size)
    expected = [[hf_logits(model, [row])[0] for row in rows] for model in oracles]
    greedy = [[hf_greedy(model, row, NEW.max_new_tokens) for row in rows] for model in oracles]
    for way in ways:
        with load_engine(store, **way) as engine:
            for i, name in enumerate(store.tenants):
                found = engine.logits(name, rows)
                for j, row in enumerate(rows):
                    assert_close(
                        found[j, : len(row)],
                        expected[i][j],
                        what=f"{name}, {way}, {len(row)} tokens",
                    )
                assert list(engine.generate(name, rows[0], NEW).token_ids) == greedy[i][0], (
                    name,
                    way,
                )
            mixed = [(i, j) for j in range(len(rows)) for i in range(len(models))]
            answers = engine.generate_batch([(store.tenants[i], rows[j]) for i, j in mixed], NEW)
            for (i, j), answer in zip(mixed, answers, strict=True):
                assert list(answer.token_ids) == greedy[i][j], (way, i, j)


@pytest.mark.parametrize("case", rest_slow(CASES, 3))
def test_every_way_to_multiply_serves_copies_plus_residuals(
    family: Family, tmp_path: Path, case: str
) -> None:
    store = prepared(tmp_path / "store", family.paths, case)
    assert store.plan.residuals
    check(store, family.models, WAYS, (9, 1, 17))


@pytest.mark.parametrize(
    "case", rest_slow(["several parts", "sign everywhere", "some projections, tenants and experts"])
)
def test_misses_beside_residuals(family: Family, tmp_path: Path, case: str) -> None:
    store = prepared(tmp_path / "store", family.paths, case, slots=3)
    assert store.plan.num_misses and store.plan.residuals
    check(store, family.models, [way | {"spare_slots": n} for way in WAYS for n in (1, 4)], (9, 2))


def test_a_long_prompt(family: Family, tmp_path: Path) -> None:
    """More rows of a copy than a work item of our own kernels has."""
    store = prepared(tmp_path / "store", family.paths, "several parts")
    check(store, family.models, WAYS[:1], (230,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    rest_slow(
        [
            {
                "hidden_size": 20,
                "intermediate_size": 27,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
            },
            {"hidden_size": 40, "intermediate_size": 64},
            {"intermediate_size": 48, "num_experts_per_tok": 3},
            {"num_experts_per_tok": 1, "hidden_act": "gelu"},
        ]
    ),
    ids=str,
)
def test_other_sizes(tmp_path: Path, sizes: dict[str, Any]) -> None:
    base = helpers.random_mixtral(3, **sizes)
    models = [base, helpers.tuned(base, 4)]
    paths = {n: helpers.save(m, tmp_path / n) for n, m in zip(("a", "b"), models, strict=True)}
    for i, case in enumerate(
        ("scales for 7 rows", "several parts", "some projections, tenants and experts")
    ):
        store = prepared(tmp_path / f"store{i}", paths, case)
        check(store, models, WAYS[:-1], (9, 4))


@pytest.mark.parametrize("seed", rest_slow(range(4)))
def test_any_mixture(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    base = helpers.random_mixtral(
        seed, hidden_size=rng.choice([32, 40]), intermediate_size=rng.choice([41, 64])
    )
    models = [base, *(helpers.tuned(base, i) for i in range(rng.randint(1, 3)))]
    paths = {f"t{i}": helpers.save(m, tmp_path / f"t{i}") for i, m in enumerate(models)}
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=rng.choice(["all", None, 5]))
    plan, means = helpers.with_merged(
        store, rng.sample(range(store.plan.num_slots), store.plan.num_slots // 2)
    )

    def parts(_t: int, _l: int, _e: int) -> list[Part]:
        return [
            Part(rng.choice(PROJECTIONS), *rng.choice(EVERY_KIND))
            for _ in range(rng.choice([0, 0, 1, 2, 3]))
        ]

    plan, records = helpers.with_residuals(plan, dict(store.experts.projections), parts, seed)
    store = set_plan(tmp_path / "store", plan, merged=means, records=records)
    check(store, models, [{"products": p, "spare_slots": 2} for p in ("auto", "plain")], (13, 5))


def test_merged_copies_alone(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=6)
    plan, means = helpers.with_merged(store, range(6))
    check(set_plan(tmp_path / "store", plan, merged=means), family.models, WAYS, (9, 3))


@pytest.mark.parametrize("way", [{}, {"products": "plain"}, {"experts": "grouped"}], ids=str)
def test_bfloat16_is_close(tmp_path: Path, way: dict[str, Any]) -> None:
    """As close to exact arithmetic as Hugging Face's own bfloat16 with the sum of copy and residual
    rounded to it."""
    base = helpers.random_mixtral(0).to(torch.bfloat16)
    paths = {
        n: helpers.save(m, tmp_path / n)
        for n, m in zip(("a", "b"), (base, helpers.tuned(base, 1)), strict=True)
    }
    models = [helpers.load(path) for path in paths.values()]
    store = prepared(tmp_path / "store", paths, "several parts")
    assert store.dtype == "bfloat16"
    rows = helpers.prompts(0, [40])
    oracles = [helpers.oracle_of_store(store, models, i) for i in range(2)]
    exact = [hf_logits(oracle, rows) for oracle in oracles]
    with load_engine(store, **way) as engine:
        for i, name in enumerate(store.tenants):
            # Saved and loaded: a cast of the model would round its rotary frequencies too.
            rounded = helpers.load(
                helpers.save(oracles[i].to(torch.bfloat16), tmp_path / f"rounded {i}"),
                torch.bfloat16,
            )
            allowed = np.abs(hf_logits(rounded, rows) - exact[i]).mean()
            error = np.abs(engine.logits(name, rows) - exact[i]).mean()
            assert error <= 1.5 * allowed, (name, error, allowed)
    with load_engine(store, dtype="float32") as engine:
        assert_close(engine.logits("b", rows), exact[1])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_residual_bytes_are_counted_and_stay_packed(
    family: Family, tmp_path: Path, way: dict[str, Any]
) -> None:
    plain = helpers.build_round_robin(tmp_path / "plain", family.paths)
    store = prepared(tmp_path / "store", family.paths, "several parts")
    assert store.residual_bytes > 0
    with load_engine(plain, **way) as without, load_engine(store, **way) as engine:
        held = engine.stats()["residual_bytes"]
        assert without.stats()["residual_bytes"] == 0
        assert engine.stats()["pool_bytes"] == without.stats()["pool_bytes"]
        pool = engine._require_backend().pool  # type: ignore[attr-defined]
        if isinstance(pool, KernelPool):  # sign parts are padded to whole blocks of 64 outputs
            found = [layer.records for layer in pool.residuals.layers]
            assert store.residual_bytes <= held <= 3 * store.residual_bytes
        else:
            found = [item.data for item in pool.residuals.items]
            assert held == store.residual_bytes
        assert sum(data.numel() for data in found) == held
        assert {data.dtype for data in found} == {torch.uint8}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("slots", [3, None])
@pytest.mark.parametrize(
    "way", [{"dtype": "float32"}, {"dtype": "bfloat16", "experts": "grouped"}], ids=str
)
def test_cuda(family: Family, tmp_path: Path, slots: int | None, way: dict[str, Any]) -> None:
    store = prepared(tmp_path / "store", family.paths, "several parts", slots=slots)
    if way["dtype"] == "float32":
        check(store, family.models, [{"device": "cuda", "spare_slots": 2} | way], (9, 1, 17))
        return
    rows = helpers.prompts(0, [40])
    with load_engine(store, device="cuda", spare_slots=2, **way) as engine:
        for i, name in enumerate(store.tenants):
            exact = hf_logits(helpers.oracle_of_store(store, family.models, i), rows)
            assert np.abs(engine.logits(name, rows) - exact).mean() <= 0.05 * np.abs(exact).mean()


# ---- the observer


class Recorder:
    """Keeps what it is shown; returns `added` times x."""

    def __init__(self, added: float | None = None):
        self.seen: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.added = added

    def __call__(
        self, tenant: str, layer: int, x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray
    ) -> np.ndarray | None:
        self.seen.append((tenant, layer, x, expert_ids, gates))
        return None if self.added is None else x * np.float32(self.added)


def routing(
    model: Any, row: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Router input [T, H], chosen experts and gates [T, K] of each layer, from transformers' own
    modules."""
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, args, out: seen.append((args[0].reshape(-1, 32), out[2], out[1]))
        )
        for layer in model.model.layers
    ]
    hf_logits(model, [row])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_observer_sees_what_hugging_face_routes(
    family: Family, tmp_path: Path, way: dict[str, Any]
) -> None:
    store = prepared(tmp_path / "store", family.paths, "several parts", slots=5)
    oracles = [helpers.oracle_of_store(store, family.models, i) for i in range(3)]
    prompts = helpers.prompts(2, (6, 11))
    recorder = Recorder()
    with load_engine(store, **way) as engine:
        engine.observe(recorder)
        answers = engine.generate_batch(
            [("ana", prompts[0]), ("bob", prompts[1])], SamplingParams(max_new_tokens=4)
        )
        seen = recorder.seen
        engine.observe(None)
        recorder.seen = []
        engine.generate("ana", prompts[0], NEW)
        assert not recorder.seen
    for name, prompt, answer, oracle in zip(
        ("ana", "bob"), prompts, answers, oracles[1:], strict=True
    ):
        expected = routing(
            oracle, [*prompt, *answer.token_ids[:-1]]
        )  # the last token is never read
        for layer, (x, ids, gates) in enumerate(expected):
            mine = [s for s in seen if s[0] == name and s[1] == layer]
            assert [len(s[2]) for s in mine] == [len(prompt)] + [1] * (len(answer.token_ids) - 1)
            found_x, found_ids, found_gates = (
                np.concatenate([s[i] for s in mine]) for i in (2, 3, 4)
            )
            assert (found_x.dtype, found_ids.dtype, found_gates.dtype) == (
                np.float32,
                np.int64,
                np.float32,
            )
            assert_close(found_x, x.numpy(), what="x")
            assert (found_ids == ids.numpy()).all()
            assert_close(found_gates, gates.float().numpy(), what="gates")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_the_observer_returns_is_added(
    family: Family, tmp_path: Path, way: dict[str, Any]
) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=5)
    model = helpers.oracle(family.models, 1, store.plan)
    rows = helpers.prompts(2, (6, 11))
    plain = [hf_logits(model, [row])[0] for row in rows]
    for layer in model.model.layers:
        # The experts' weighted sum, plus half of what they read.
        layer.mlp.experts.register_forward_hook(
            lambda _m, args, out: out + 0.5 * args[0].reshape(out.shape)
        )
    expected = [hf_logits(model, [row])[0] for row in rows]
    assert np.abs(expected[0] - plain[0]).max() > 0.1
    with load_engine(store, **way) as engine:
        engine.observe(Recorder(0.5))
        for found, row, e in zip(engine.logits("ana", rows), rows, expected, strict=True):
            assert_close(found[: len(row)], e)
        engine.observe(None)
        assert_close(engine.logits("ana", rows[:1])[0], plain[0])


def test_an_observer_that_returns_another_shape_is_refused(family: Family, tmp_path: Path) -> None:
    with load_engine(helpers.build_round_robin(tmp_path / "store", family.paths)) as engine:
        engine.observe(lambda _t, _l, x, _i, _g: x[:1])
        with pytest.raises(ValueError, match=r"the observer returned \[1, 32\] for x \[5, 32\]"):
            engine.logits("ana", helpers.prompts(0, [5]))
