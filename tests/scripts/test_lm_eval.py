"""The lm-eval model against lm-eval's own `hf` model on the same checkpoints.

tests/data/lm_eval/hf.json has what lm-eval 0.4.13's `hf` model (float32, batch size 1, transformers
5.23) answered to every request of the tasks beside it, on examples/tenants/fr and
examples/tenants/switch/fr.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    EngineError,
    MoetelError,
    RequestError,
    SamplingParams,
    UnknownTenantError,
    build_store,
    load_engine,
)
from scripts import cli
from tests import helpers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: pip install 'moetel[lm-eval]'"
)

from scripts.quality.lm_eval_model import MoetelLM  # noqa: E402

TASKS = helpers.DATA / "lm_eval"
EXAMPLES = helpers.REPOSITORY / "examples" / "tenants"


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tasks name their data from here; data sets are cached nowhere but in the test's folder."""
    import datasets

    monkeypatch.chdir(helpers.REPOSITORY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nothing shared, and shared by the paper's rule."""
    root = tmp_path_factory.mktemp("stores")
    tenants = {name: EXAMPLES / name for name in ("en", "fr")}
    build_store(root / "all", tenants, slots="all")
    build_store(root / "shared", tenants, policy="round_robin")
    build_store(root / "switch", {"fr": EXAMPLES / "switch" / "fr"})
    return {name: root / name for name in ("all", "shared", "switch")}


def run_tasks(model: MoetelLM, names: list[str]) -> dict[str, dict[str, Any]]:
    """Task -> results and responses, as hf.json has them."""
    from lm_eval.tasks import TaskManager

    out = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=str(TASKS)),
        log_samples=True,
        bootstrap_iters=0,
        batch_size=model.batch_size,
    )
    return {
        name: {
            "results": {key.split(",")[0]: value for key, value in out["results"][name].items()},
            "responses": [sample["filtered_resps"] for sample in out["samples"][name]],
        }
        for name in names
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_equals_the_hf_model(family: str, stores: dict[str, Path]) -> None:
    if family == "switch_transformers":
        pytest.importorskip("jax")
    expected = json.loads((TASKS / "hf.json").read_text(encoding="utf-8"))
    names = [
        name for name in expected if name.endswith("_seq2seq") == (family == "switch_transformers")
    ]
    assert len(names) == 4
    store = stores["all" if family == "mixtral" else "switch"]
    model = MoetelLM(str(store), "fr", dtype="float32", batch_size=5)
    found = run_tasks(model, names)
    model.engine.close()
    for name in names:
        for metric, value in expected[name]["results"].items():
            assert found[name]["results"][metric] == pytest.approx(value, rel=1e-4), (name, metric)
        for got, wanted in zip(found[name]["responses"], expected[name]["responses"], strict=True):
            for one, other in zip(got, wanted, strict=True):
                if isinstance(other, list):  # log-probability, whether greedy
                    assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] is other[1], name
                elif isinstance(other, float):
                    assert one == pytest.approx(other, abs=1e-3), name
                else:
                    assert one == other, name


class Request:
    """What the model reads of lm-eval's Instance."""

    def __init__(self, *args: Any):
        self.args = args


def test_shared_and_alone(stores: dict[str, Path]) -> None:
    asked = [
        Request("<s>1234<sep>", "mille deux cent trente-quatre</s>"),
        Request("<s>77<sep>", "x"),
        Request("", "un"),
    ]
    with_own = MoetelLM(str(stores["all"]), "fr").loglikelihood(asked, disable_tqdm=True)
    shared = MoetelLM(str(stores["shared"]), "fr").loglikelihood(asked, disable_tqdm=True)
    alone = MoetelLM(str(stores["shared"]), "fr", alone=True, batch_size=2).loglikelihood(
        asked, disable_tqdm=True
    )
    for a, b, c in zip(with_own, alone, shared, strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.05) and a[0] != c[0]
    assert with_own[0][1] is True and with_own[1][1] is False


def test_long_texts_in_windows(stores: dict[str, Path]) -> None:
    text = "neuf cent trente-quatre mille deux cent douze et vingt-sept"
    model = MoetelLM(str(stores["all"]), "fr", max_length=6, dtype="float32")
    (found,) = model.loglikelihood_rolling([Request(text)], disable_tqdm=True)
    ids = model.tok_encode(text)
    assert len(ids) > 12
    hf = helpers.load(EXAMPLES / "fr")
    total, at = 0.0, 0
    while at < len(ids):  # six tokens predicted at a time, from as many as go before
        end = min(len(ids), at + 6)
        row = [model.prefix_token_id, *ids][max(0, end - 6) : end]
        logits = helpers.hf_logits(hf, [row])[0].astype("float64")
        for i in range(at, end):
            scores = logits[i - end]
            total += scores[ids[i]] - np.log(np.exp(scores).sum())
        at = end
    assert found == pytest.approx(total, abs=1e-3)


def test_generation_options(stores: dict[str, Path]) -> None:
    model = MoetelLM(str(stores["all"]), "fr", seed=7)
    prompt = "<s>41755<sep>"

    def answer(**options: Any) -> str:
        return model.generate_until([Request(prompt, options)], disable_tqdm=True)[0]

    assert answer(until=["\n"]) == "quarante et un mille sept cent cinquante-cinq"
    assert answer(until=[" mille", "-"], max_gen_toks=30) == "quarante et un"
    assert answer(until=[], max_gen_toks=1) == model.tokenizer.decode(
        model.tok_encode("quarante", False)[:1]
    )
    sampled = answer(
        until=[], do_sample=True, temperature=3.0, top_p=0.9, top_k=40, max_gen_toks=20
    )
    params = SamplingParams(max_new_tokens=20, temperature=3.0, top_p=0.9, top_k=40, seed=7)
    with load_engine(stores["all"]) as engine:
        assert sampled == engine.generate("fr", model.tok_encode(prompt), params).text
    with pytest.raises(RequestError, match="generation option 'num_beams' is not supported"):
        answer(until=[], num_beams=4)
    with pytest.raises(RequestError, match="leave no room for a prompt"):
        answer(until=[], max_gen_toks=100_000)


def test_bad_arguments(stores: dict[str, Path], family: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownTenantError, match="no tenant '1' in this store"):
        MoetelLM(str(stores["all"]), 1)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="max_length is 0"):
        MoetelLM(str(stores["all"]), "fr", max_length=0)
    with pytest.raises(MoetelError, match="no option 'colour'"):
        MoetelLM(str(stores["all"]), "fr", colour="red")
    build_store(tmp_path / "mute", {"ana": family.paths["ana"]})
    with pytest.raises(RequestError, match="'ana' has no tokenizer"):
        MoetelLM(str(tmp_path / "mute"), "ana")


@pytest.mark.slow
def test_command(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "--model",
        "moetel",
        "--model_args",
        f"store={stores['shared']},tenant=fr",
        "--tasks",
        "moetel_spell",
    ]
    arguments += [
        "--include_path",
        str(TASKS),
        "--batch_size",
        "8",
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert cli.main(["lm-eval", *arguments]) == 0
    assert "|moetel_spell|" in capsys.readouterr().out.replace(" ", "")
    (written,) = (tmp_path / "out").rglob("results*.json")
    value = json.loads(written.read_text())
    assert value["results"]["moetel_spell"]["exact_match,none"] > 0.8
    assert value["config"]["moetel_policy"] == "round_robin"
    arguments[3] = f"store={tmp_path / 'none'},tenant=fr"
    assert cli.main(["lm-eval", *arguments]) == 1
    assert "not a store" in capsys.readouterr().err
