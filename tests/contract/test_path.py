"""How much code is between a prompt and a token: the functions that one request goes through."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from common import SamplingParams, build_store, load_engine
from tests import helpers
from tests.byte_tokenizer import byte_tokenizer

MOST_LINES = 2500


def lines_of(codes: set[CodeType]) -> set[tuple[str, int]]:
    """(file, line) of all functions, comments and docstrings counted."""
    found = set()
    for code in codes:
        source, start = inspect.getsourcelines(code)
        found |= {(code.co_filename, start + i) for i in range(len(source))}
    return found


def path_of(store: Path, **options: Any) -> set[tuple[str, int]]:
    """What the second tenant's request goes through when the engine has answered another's."""
    codes: set[CodeType] = set()
    root = str(helpers.REPOSITORY)

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and "<" not in code.co_name[:1]:
            codes.add(code)

    params = SamplingParams(max_new_tokens=3, temperature=0.7, top_p=0.9, seed=1)
    with load_engine(store, **options) as engine:
        first, second = engine.tenants
        engine.generate(first, "one", params)
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            answer = engine.generate(second, "two words", params)
        finally:
            sys.setprofile(before)
    assert len(answer.token_ids) and answer.text is not None
    return lines_of({c for c in codes if ".venv" not in c.co_filename})


@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_a_prompt_becomes_a_token_in_few_lines(family: str, tmp_path: Path) -> None:
    if family == "mixtral":
        base: Any = helpers.random_mixtral(0, vocab_size=264)
        tuned: Any = helpers.tuned(base, 1)
    else:
        pytest.importorskip("jax")
        from tests import switch_models

        base = switch_models.random_switch(0, vocab_size=264)
        tuned = switch_models.tuned(base, 1)
    paths = {}
    for name, model in (("base", base), ("ana", tuned)):
        paths[name] = helpers.save(model, tmp_path / name)
        byte_tokenizer([]).save_pretrained(paths[name])
    build_store(tmp_path / "store", paths, policy="residual", extra=0.3)
    found = path_of(tmp_path / "store", device="cpu")
    assert 500 < len(found) <= MOST_LINES, f"{len(found)} lines from a prompt to a token"
    assert any(name.endswith("serving/sampling.py") for name, _ in found)
