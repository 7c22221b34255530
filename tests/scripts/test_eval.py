"""Quality measured through the engines, against the same figures computed with transformers and
torch here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

from common import Store, UnknownTenantError, build_store
from scripts import cli
from scripts.demo.number_words import expected, held_out
from scripts.quality.measure import evaluate_store, measure, measure_alone
from scripts.quality.report import Spread, table
from scripts.quality.scores import Memory, Result, Scores, rouge
from scripts.quality.task import Options, Question, Task, TaskError
from tests import helpers
from tests.conftest import Family

EXAMPLES = helpers.REPOSITORY / "examples" / "tenants"
NUMBERS = held_out(8, seed=3)
FLOAT32 = Options(dtype="float32", max_new_tokens=60)


def task(language: str, numbers: list[int] = NUMBERS) -> Task:
    return Task(tuple(Question(str(n), expected(n, language)) for n in numbers))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four tenants, the paper's rule."""
    path = tmp_path_factory.mktemp("store") / "store"
    return build_store(
        path, {lang: EXAMPLES / lang for lang in ("en", "fr", "de", "es")}, policy="round_robin"
    )


@pytest.mark.slow
@torch.inference_mode()
def test_scores_equal_transformers(store: Store) -> None:
    """One tenant's exact match, KL and agreement along its own answers, and perplexity in
    windows."""
    text = "neuf cent trente-quatre mille deux cent douze"
    ((alone, served),) = [
        (results[0].tenants["es"], results[1].tenants["es"])
        for results in [
            evaluate_store(
                store,
                {"es": Task(task("es").questions, (text, "uno"))},
                Options(7, 3, 60, dtype="float32"),
            )
        ]
    ]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "es")
    own = helpers.load(EXAMPLES / "es")
    shared = helpers.oracle(
        [helpers.load(EXAMPLES / lang) for lang in store.tenants], 3, store.plan
    )
    right, kl, same, positions = 0, 0.0, 0, 0
    eos = own.generation_config.eos_token_id
    for number in NUMBERS:
        prompt = tokenizer(str(number))["input_ids"]
        mine, other = (helpers.hf_greedy(m, prompt, 60, eos) for m in (own, shared))
        right += tokenizer.decode(other, skip_special_tokens=True) == expected(number, "es")
        logits = [
            torch.tensor(helpers.hf_logits(m, [prompt + mine[:-1]])[0, len(prompt) - 1 :])
            for m in (own, shared)
        ]
        p, q = (F.log_softmax(x.double(), dim=-1) for x in logits)
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(mine)
    for model, scores in ((own, alone), (shared, served)):
        total, tokens = 0.0, 0
        for one in (text, "uno"):
            ids = tokenizer(one)["input_ids"]
            at, end = (
                1,
                min(len(ids), 8),
            )  # seven new tokens, then three at a time behind the seven before them
            while at < len(ids):
                row = ids[max(0, end - 8) : end]
                logits_of = torch.tensor(helpers.hf_logits(model, [row[:-1]])[0])[
                    -(end - at) :
                ].double()
                total += float(
                    F.cross_entropy(logits_of, torch.tensor(ids[at:end]), reduction="sum")
                )
                tokens += end - at
                at, end = end, min(len(ids), end + 3)
        assert scores.tokens == tokens
        assert scores.perplexity == pytest.approx(np.exp(total / tokens), rel=1e-4)
        assert scores.word_perplexity == pytest.approx(np.exp(total / 8), rel=1e-3)
        assert scores.bits_per_byte == pytest.approx(total / np.log(2) / (len(text) + 3), rel=1e-4)
        text_positions = tokens
    assert served.exact_match == right / len(NUMBERS) and alone.exact_match == 1.0
    assert served.positions == positions + text_positions
    # The text's positions count too; here those of the answers alone.
    only = evaluate_store(store, {"es": task("es")}, FLOAT32)[1].tenants["es"]
    assert only.positions == positions
    assert only.kl == pytest.approx(kl / positions, rel=1e-3) and only.kl > 1e-4
    assert only.top1 == same / positions
    assert only.kept == served.exact_match and only.metric == "exact_match"


@pytest.mark.slow
def test_switch_equals_transformers(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    tenants = {lang: EXAMPLES / "switch" / lang for lang in ("en", "fr")}
    store = build_store(tmp_path / "store", tenants, policy="round_robin")
    options = Options(dtype="float32", max_new_tokens=60, forced="given")
    alone, served = evaluate_store(store, {"fr": task("fr", NUMBERS[:4])}, options)
    store.export("fr", tmp_path / "fr")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "switch" / "fr")
    own, other = (
        SwitchTransformersForConditionalGeneration.from_pretrained(p, dtype=torch.float32).eval()
        for p in (tenants["fr"], tmp_path / "fr")
    )
    kl, positions = 0.0, 0
    for number in NUMBERS[:4]:
        ids = torch.tensor([tokenizer(str(number))["input_ids"]])
        labels = torch.tensor([tokenizer(expected(number, "fr"))["input_ids"]])
        with torch.inference_mode():
            p, q = (
                F.log_softmax(m(input_ids=ids, labels=labels).logits.double(), dim=-1)
                for m in (own, other)
            )
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        positions += labels.shape[1]
    assert served.tenants["fr"].positions == positions
    assert served.tenants["fr"].kl == pytest.approx(kl / positions, rel=1e-3)
    assert alone.tenants["fr"].exact_match == 1.0
    assert (alone.memory.share, served.memory.share) == (2.0, 1.0)
    with pytest.raises(TaskError, match="'fr' is an encoder-decoder"):
        evaluate_store(store, {"fr": Task(texts=("un",))})


@pytest.mark.slow
def test_limits_of_memory_change_nothing(store: Store, tmp_path: Path) -> None:
    tasks = {"es": Task(task("es").questions, ("mil doscientos treinta y cuatro",))}
    few = Options(dtype="float32", max_new_tokens=60, logits_bytes=1)
    found = []
    for i, options in enumerate((FLOAT32, few)):
        (tmp_path / str(i)).mkdir()
        own = measure_alone(store, tasks, options, tmp_path / str(i))
        found.append(measure(store, own, options)["es"])
    assert (
        found[0].kl == pytest.approx(found[1].kl, abs=1e-7)
        and found[0].positions == found[1].positions
    )
    assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-5)
    (tmp_path / "part").mkdir()
    part = measure_alone(store, tasks, Options(max_new_tokens=60, positions=30), tmp_path / "part")[
        "es"
    ]
    assert 0 < part.scores.positions <= 30 and part.scores.tokens == found[0].tokens
    assert part.logits is not None and part.logits.shape == (part.scores.positions, 512)


def test_token_ids_without_a_tokenizer(family: Family, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", family.paths, policy="round_robin")
    prompts = helpers.prompts(0, [5, 3])
    answer = tuple(helpers.hf_greedy(family.models[1], prompts[0], 6, eos=2))
    answer = answer[:-1] if answer[-1] == 2 else answer
    task = Task(
        (Question(prompts[0], answer), Question(prompts[1], (1, 1, 1))), (tuple(prompts[0]),)
    )
    scores = evaluate_store(store, {"ana": task}, Options(max_new_tokens=6))[0].tenants["ana"]
    assert scores.exact_match == 0.5 and scores.rouge1 is None and scores.word_perplexity is None
    logits = torch.tensor(helpers.hf_logits(family.models[1], [prompts[0]])[0, :-1])
    nll = F.cross_entropy(logits, torch.tensor(prompts[0][1:]))
    assert scores.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


def test_rouge() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("the cat sat on the mat", "the mat sat, on a cat"), ("one two", "Two one three")]
    found = rouge(pairs)
    scorer = RougeScorer(["rouge1", "rougeL"])
    for i, kind in enumerate(("rouge1", "rougeL")):
        assert found[i] == pytest.approx(
            np.mean([scorer.score(a, b)[kind].fmeasure for a, b in pairs])
        )
    assert rouge([("dziewięć tysięcy", "dziewięć")]) == pytest.approx(
        (2 / 3, 2 / 3)
    )  # letters beyond ASCII are letters


def test_tables_over_seeds() -> None:
    memory = Memory(100, 15, 40, 15, 1.15)

    def result(method: str, seed: int, kept: float, kl: float, expected: float) -> Result:
        scores = {
            "a": Scores(kept, kl=kl, kept=kept, metric="exact_match"),
            "b": Scores(1.0, kl=0.0, kept=1.0),
        }
        return Result(method, "m", seed, memory, scores, 0, 0, {"a": expected, "b": 0.0})

    results = [
        result("x", 0, 0.5, 0.2, 3),
        result("x", 1, 0.7, 0.2, 3),
        result("y", 0, 0.9, 0.1, 2),
    ]
    results += [
        result("y", 1, 0.9, 0.1, 2),
        result("z", 0, 1.0, 0.0, 1),
        result("z", 1, 1.0, 0.3, 1),
    ]
    titles, rows = table(results)
    assert rows[0][: titles.index("KL, mean")] == [
        "x",
        "115.0%",
        "80.0% (75.0% to 85.0%)",
        "60.0% (50.0% to 70.0%), a",
    ]
    assert rows[1][2] == "95.0%" and rows[0][-2:] == [
        "60.0% (50.0% to 70.0%)",
        "100.0%",
    ]
    assert Spread.of([None, None]) is None
    assert results[0].worst("kl") == 0.2 and results[0].worst("kept") == 0.5


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2: not JSON"),
        ('{"question": "1"}', "line 2: expected"),
        ('{"prompt": "1", "text": "2"}', "line 2: has both prompt and text; keep"),
        ('{"answer": "1", "text": "2"}', "line 2: has both text and answer; write"),
        ('{"prompt": ""}', "line 2: prompt is ''"),
        ('{"prompt": "1", "answer": 3}', "line 2: answer is '3'"),
        ('{"text": [1, "a"]}', "line 2: text is"),
    ],
)
def test_bad_task_files(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "1", "answer": [4, 5]}\n' + line + "\n")
    with pytest.raises(TaskError, match=re.escape(f"{file}, {what}")):
        Task.read(file)
    file.write_text("\n")
    with pytest.raises(TaskError, match="no line in it"):
        Task.read(file)


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(
        '{"text": "four\u2028lines\x85of\u2029one"}\r\n\n{"prompt": "a\u2028b"}\n', encoding="utf-8"
    )
    found = Task.read(file)
    assert found.texts == ("four\u2028lines\x85of\u2029one",) and found.questions == (
        Question("a\u2028b"),
    )


def test_bad_arguments(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TaskError, match="no task"):
        evaluate_store(store, {})
    with pytest.raises(UnknownTenantError, match="'it'"):
        evaluate_store(store, {"it": task("it")})
    with pytest.raises(TaskError, match="window 1000 is longer than the context of tenant 'fr'"):
        evaluate_store(store, {"fr": Task(texts=("un",))}, Options(window=1000))
    with pytest.raises(TaskError, match="has no perplexity"):
        evaluate_store(store, {"fr": task("fr", NUMBERS[:1])}, Options(metric="perplexity"))
    with pytest.raises(TaskError, match="nothing to score for tenant 'fr'"):
        evaluate_store(store, {"fr": Task(texts=((5,),))})
    with pytest.raises(TaskError, match="stride 9 is longer than window 4"):
        Options(window=4, stride=9)
    (tmp_path / "fr.jsonl").write_text('{"prompt": "1"}\n')
    asked: list[Any] = ["eval", f"--task=fr={tmp_path / 'fr.jsonl'}"]
    assert cli.main(asked) == 1 and "either a STORE, or tenants" in capsys.readouterr().err
    assert cli.main([*asked, str(store.path), "--methods", "mean"]) == 1
    assert "measured as it is" in " ".join(capsys.readouterr().err.split())


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"prompt": str(n), "answer": expected(n, "fr")}) for n in NUMBERS[:3]]
    (tmp_path / "fr.jsonl").write_text("\n".join([*lines, json.dumps({"text": "trois cent"}), ""]))
    build_store(tmp_path / "store", {"fr": EXAMPLES / "fr"}, policy="round_robin")
    asked = [f"--task=fr={tmp_path / 'fr.jsonl'}", "--limit=1", f"--out={tmp_path / 'out'}"]
    assert cli.main(["eval", str(tmp_path / "store"), *asked, "--metric=perplexity"]) == 0
    assert "kept 100.0%" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"quality.json", "quality.md"}
    # Without `benchmarks` there is nothing to compare methods with.
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.setitem(sys.modules, "benchmarks.quality.plot", None)
    assert cli.main(["eval", f"--tenant=fr={EXAMPLES / 'fr'}", *asked]) == 1
    assert "needs the folder benchmarks/" in capsys.readouterr().err
