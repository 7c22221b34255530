"""Files of examples: read line by line, and bad lines named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common import RequestError
from common.build.examples import CalibrationSet, Example


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines),
        "utf-8",
    )
    return path


def test_examples_are_read_line_by_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "one", "answer": "1"},
        "",
        {"prompt": "two"},
        {"text": "three"},
        {"prompt": "four\u2028lines\x85of\x0bone", "answer": ""},
        "   \r",
    )
    found = CalibrationSet.read(path, max_new_tokens=7)
    assert found.max_new_tokens == 7
    assert found.examples == (
        Example("one", "1"),
        Example("two", None),
        Example("three", ""),
        Example("four\u2028lines\x85of\x0bone", ""),
    )
    assert CalibrationSet.of([[3, 4], "five"]).examples == (Example([3, 4]), Example("five"))
    assert CalibrationSet.texts([[3, 4], "five"]).examples == (
        Example([3, 4], ()),
        Example("five", ""),
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no example; give at least one line"),
        (["", "  "], "holds no example"),
        (
            [{"prompt": "a"}, "{"],
            r"line 2: not JSON \(Expecting .* at character 2\); write one object a line",
        ),
        ([{"prompt": "a"}, "", "nonsense"], "line 3: not JSON"),
        ([["prompt"]], r"line 1: expected \{\"prompt\""),
        ([{"question": "a"}], "line 1: expected"),
        (["3"], "line 1: expected"),
        ([{"prompt": ""}], "line 1: prompt, answer and text are strings, and not empty"),
        ([{"prompt": None}], "line 1: prompt"),
        ([{"prompt": 3}], "line 1: prompt"),
        (['{"prompt": NaN}'], "line 1: prompt"),
        ([{"prompt": "a", "answer": 4}], "line 1: prompt"),
        ([{"text": ["a"]}], "line 1: prompt"),
        ([{"text": "a"}, {"prompt": "b", "text": "a"}], "line 2: has both prompt and text; keep"),
        (
            [{"text": "a", "answer": "b"}],
            "line 1: has both text and answer; write prompt and answer, or text alone",
        ),
    ],
)
def test_bad_lines_are_named(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(RequestError, match=f"bad.jsonl.*{message}"):
        CalibrationSet.read(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name in ("absent.jsonl", "latin.jsonl", "."):
        with pytest.raises(RequestError, match="cannot be read"):
            CalibrationSet.read(tmp_path / name)
