"""lm-eval's own `local-completions` model against a server: the scores of the adapter in Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import build_store, load_engine
from tests import helpers
from tests.server.live import Live, Loop

os.environ.setdefault("HF_HUB_OFFLINE", "1")
lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: pip install 'moetel[lm-eval]'"
)
pytest.importorskip("tenacity", reason="lm-eval's models of servers need it")

from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402

from scripts.quality.lm_eval_model import MoetelLM  # noqa: E402

TASKS = helpers.DATA / "lm_eval"
TENANT = helpers.REPOSITORY / "examples" / "tenants" / "fr"
CONTEXT = 256

CONTINUED = """
task: moetel_continued
dataset_path: json
dataset_kwargs:
  data_files:
    test: tests/data/lm_eval/numbers.jsonl
test_split: test
output_type: loglikelihood
doc_to_text: "<s>{{number}}<sep>"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
  - metric: acc
"""
"""Whether the answer is the greedy one, and its log-likelihood."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tenants that share experts."""
    path = tmp_path_factory.mktemp("lm_eval") / "store"
    tenants = {name: TENANT.parent / name for name in ("en", "fr")}
    build_store(path, tenants, policy="round_robin")
    return path


@pytest.fixture(scope="module")
def examples(store: Path) -> Iterator[Live]:
    loop = Loop(load_engine(store, device="cpu", dtype="float32"))
    with loop.serve() as live:
        yield live
    loop.close()


def over_http(live: Live, **more: Any) -> Any:
    return LocalCompletionsAPI(
        model="fr",
        base_url=f"{live.url}/v1/completions",
        tokenizer=str(TENANT),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        **more,
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_the_adapter(
    examples: Live,
    store: Path,
    batch_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(helpers.REPOSITORY)  # tasks name their data from here
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "continued.yaml").write_text(CONTINUED)
    manager = TaskManager(include_path=[str(TASKS), str(tmp_path)])
    names = ["moetel_choice", "moetel_continued"]

    def run(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        return found

    inside = MoetelLM(str(store), "fr", dtype="float32", device="cpu")
    expected, found = run(inside), run(over_http(examples, batch_size=batch_size))
    inside.engine.close()
    greedy = []
    for name in names:
        assert len(found["samples"][name]) == 12
        for ours, theirs in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert ours["doc"] == theirs["doc"]
            for one, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
                one, other = (x if isinstance(x, tuple | list) else (x, None) for x in (one, other))
                assert one[0] == pytest.approx(other[0], abs=1e-4), name
                assert one[1] == other[1]
                greedy.append(one[1])
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-4), metric
    assert True in greedy and False in greedy


def test_whole_texts_too(examples: Live, store: Path) -> None:
    class Request:
        args = ("neuf cent trente-quatre mille deux cent douze et vingt-sept",)

    # lm-eval's models of servers begin no text with a special token unless they are told to.
    inside = MoetelLM(str(store), "fr", dtype="float32", device="cpu", add_bos_token=False)
    prefix = inside.prefix_token_id
    expected = inside.loglikelihood_rolling([Request()], disable_tqdm=True)
    inside.engine.close()
    outside = over_http(examples, custom_prefix_token_id=prefix)
    found = outside.loglikelihood_rolling([Request()], disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)
