"""How pages are written: short sentences, one a line, and links, files and commands that exist."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import moetel
from scripts.cli import COMMANDS, MODULES
from tests.helpers import REPOSITORY

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
RESULTS = DOCS / "results"
PAGES = [
    README,
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "examples").rglob("README.md")),
    *(page for page in sorted(DOCS.rglob("*.md")) if page.parent != RESULTS),
    RESULTS / "README.md",
]
MAX_WORDS = 22
MAX_README_LINES = 120

FENCE = re.compile(r"^\s*(```|~~~)")
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
SENTENCE_END = re.compile(r"[.!?][\"')*_]*\s+[\"'(*_]*[A-Z]")
ROOMS = "common|moetel|torch_engine|jax_engine|scripts|benchmarks|tests|examples|docs"
FILE = re.compile(rf"(?:{ROOMS})/[\w./-]*")
MODULE = re.compile(r"python -m ((?:scripts|benchmarks)[\w.]*)")
COMMAND = re.compile(r"(?<!from )\bmoetel ([a-z][\w-]*)")


def lines(page: Path, code: bool) -> Iterator[tuple[int, str]]:
    """Numbered lines inside fences, or outside of them."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif inside == code:
            yield number, line


def prose(page: Path) -> Iterator[tuple[int, str, bool]]:
    """(number, text, whether the line before belongs to the same paragraph) of lines of prose.

    Left out: code, tables, headings, pictures, comments and directives.
    """
    before = -1
    for number, line in lines(page, code=False):
        text = line.strip()
        if not text or text[0] in "|#<" or text.startswith((":::", "---", "???", "!!!")):
            continue
        item = re.match(r"(?:[-*+]|\d+\.)\s+", text)
        text = LINK.sub(r"\1", CODE.sub("code", text[item.end() :] if item else text)).strip()
        if text:
            yield number, text, number == before + 1 and item is None
            before = number


def faults_of_sentences(page: Path) -> list[str]:
    """Lines that are not one short sentence."""
    wrong = []
    previous = ""
    for number, text, goes_on in prose(page):
        if len(text.split()) > MAX_WORDS:
            wrong.append(f"{number}: {len(text.split())} words, at most {MAX_WORDS}: {text}")
        if SENTENCE_END.search(text):
            wrong.append(f"{number}: more than one sentence on a line: {text}")
        if goes_on and previous[-1] not in ".!?:":
            wrong.append(f"{number}: the sentence before ends on this line: {text}")
        previous = text.rstrip("\"')*_")
    return wrong


def faults_of_links(page: Path) -> list[str]:
    """Links and names of files that lead nowhere."""
    wrong = []
    for number, line in lines(page, code=False):
        for _, target in LINK.findall(CODE.sub("", line)):
            file, _, heading = target.partition("#")
            path = (page.parent / file) if file else page
            if "://" in target:
                continue
            if not path.exists():
                wrong.append(f"{number}: no {target}")
            elif heading and heading not in headings(path):
                wrong.append(f"{number}: no heading #{heading} in {path.name}")
            elif page.is_relative_to(DOCS) and not path.resolve().is_relative_to(DOCS):
                wrong.append(f"{number}: {target} lies outside the pages that are built")
        for span in CODE.findall(line):
            if FILE.fullmatch(span) and not (REPOSITORY / span).exists():
                wrong.append(f"{number}: no file {span}")
    return wrong


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = (line.lstrip("# ") for _, line in lines(page, code=False) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def flags(command: str) -> str:
    """The help of a command."""
    module = importlib.import_module(f"scripts.commands.{MODULES.get(command, command)}")
    parser = argparse.ArgumentParser(prog=command)
    module.add_arguments(parser)
    return parser.format_help()


def faults_of_commands(page: Path) -> list[str]:
    """Commands, and flags of commands, that do not exist."""
    spans = [(n, span) for n, line in lines(page, code=False) for span in CODE.findall(line)]
    wrong = []
    for number, line in [*lines(page, code=True), *spans]:
        for name in MODULE.findall(line):
            place = REPOSITORY / name.rstrip(".").replace(".", "/")
            if not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file():
                wrong.append(f"{number}: no module {name}")
        for match in COMMAND.finditer(line.partition("#")[0]):
            name, given = match[1], line[match.end() :].partition("#")[0]
            if name not in COMMANDS:
                wrong.append(f"{number}: no command moetel {name}")
            elif name not in ("lm-eval", "keys"):  # theirs are lm-eval's, and an action's
                shown = flags(name)
                unknown = [f for f in re.findall(r"(--[a-z][\w-]*)", given) if f not in shown]
                wrong += [f"{number}: moetel {name} has no {flag}" for flag in unknown]
    return wrong


def check(faults: Callable[[Path], list[str]]) -> None:
    wrong = [f"{p.relative_to(REPOSITORY)}:{fault}" for p in PAGES for fault in faults(p)]
    assert not wrong, "\n".join(wrong)


def test_a_line_is_a_short_sentence() -> None:
    check(faults_of_sentences)


def test_links_and_files_exist() -> None:
    check(faults_of_links)


def test_commands_and_their_flags_exist() -> None:
    check(faults_of_commands)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_every_result_has_a_line_in_the_index() -> None:
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    absent = [p.name for p in RESULTS.glob("*.md") if p.name != "README.md" and p.name not in index]
    assert not absent, f"docs/results/README.md does not list {', '.join(sorted(absent))}"


def test_the_reference_has_all_that_users_import() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    named = set(re.findall(r"^::: moetel\.(\w+)$", text, re.MULTILINE))
    assert named == set(moetel.__all__) - {"__version__"}


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    """Else the tests above would pass whatever is written."""
    page = tmp_path / "page.md"
    long = " ".join(["word"] * (MAX_WORDS + 1))
    commands = "`moetel nothing` is\nnot `python -m scripts.no`."
    page.write_text(f"One. Two.\n\nA sentence that\ngoes on.\n\n{long}.\n\n{commands}\n")
    sentences = faults_of_sentences(page)
    assert [s.partition(":")[0] for s in sentences] == ["1", "4", "6", "9"], sentences
    assert faults_of_commands(page) == [
        "8: no command moetel nothing",
        "9: no module scripts.no",
    ]
    page.write_text("[a](absent.md) and `common/absent.py`\n")
    assert faults_of_links(page) == ["1: no absent.md", "1: no file common/absent.py"]
