"""The command line: output, exit codes, error messages without a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import common.build.build
from common import SamplingParams, Store, load_engine
from scripts import cli
from tests import helpers
from tests.common.checkpoints import adapters
from tests.conftest import Family

# The plans that these tests state are those of the paper's rule.
build_store = partial(common.build.build.build_store, policy="round_robin")


@pytest.fixture
def store(family: Family, tmp_path: Path) -> Path:
    build_store(tmp_path / "store", family.paths, slots=5)
    return tmp_path / "store"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `moetel ARGUMENTS`."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def test_build_inspect_verify_export_add_remove(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store"
    tenants = [f"--tenant={n}={p}" for n, p in family.paths.items()]
    code, out, _ = run(
        capsys, "build", path, *tenants[:2], "--slots", "6", "--policy", "round_robin"
    )
    assert code == 0
    assert "2 tenants (base, ana), mixtral, float32" in out
    assert "resident copies: 6 for 8 positions x 2 tenants; 4 look-up places miss" in out
    code, out, _ = run(capsys, "add", path, tenants[2])
    assert code == 0 and "3 tenants (base, ana, bob)" in out
    picture = tmp_path / "plan.png"
    code, out, _ = run(capsys, "inspect", path, "--plot", picture)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    found = Store.open(path)
    unfolded = re.sub(r"[\s│]", "", out)  # a long path is folded in its cell
    assert str(family.paths["bob"]) in unfolded and "policy round_robin, slots 6" in out
    assert f"{found.manifest.similarity['layers'][1]['mean']:.4g}" in out
    code, out, _ = run(capsys, "verify", path)
    assert code == 0 and f"sound, {len(found.manifest.objects)} tensors checked" in out
    code, out, _ = run(capsys, "export", path, "--tenant", "ana", tmp_path / "exported")
    assert len({file.stat().st_mode for file in (tmp_path / "exported").iterdir()}) == 1, (
        "as readable as config.json"
    )
    assert code == 0
    rows = helpers.prompts(0, [5])
    expected = helpers.hf_logits(helpers.oracle(family.models, 1, found.plan), rows)
    helpers.assert_close(helpers.hf_logits(helpers.load(tmp_path / "exported"), rows), expected)
    code, out, _ = run(capsys, "remove", path, "--tenant", "base")
    assert code == 0 and Store.open(path).tenants == ("ana", "bob")


@pytest.mark.parametrize("slots", ["0", "all"])
def test_inspect_draws_any_plan(
    slots: str, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "store", tmp_path / "plan.png"
    assert (
        run(capsys, "build", path, f"--tenant=ana={family.paths['ana']}", "--slots", slots)[0] == 0
    )
    assert run(capsys, "inspect", path, "--plot", picture)[0] == 0
    assert picture.stat().st_size > 5000


def test_bases_of_adapters(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for all, or by name; and what the build says of each."""
    path, base = tmp_path / "store", family.paths["base"]
    one, two = (
        adapters.write(tmp_path / name, base_model_name_or_path="some/base")
        for name in ("one", "two")
    )
    command = ("build", path, f"--tenant=one={one}", f"--tenant=base={base}", f"--tenant=two={two}")
    code, out, err = run(capsys, *command, "--base", base)
    assert code == 0, err
    kind = "low rank 4, 1 of 8 experts moved"
    assert f"one: beside base: {kind}" in out and f"two: beside base: {kind}" in out
    assert f"one: an adapter of {base}: {kind} (LoRA of rank 4)" in out
    code, out, err = run(capsys, *command[:-1], "--base", f"one={base}")
    assert code == 0, err
    code, out, err = run(capsys, "add", path, f"--tenant=two={two}", "--base", base)
    assert code == 0 and f"two: beside base: {kind}" in out, err
    for arguments, message in (
        (command, "names 'some/base'"),
        ((*command, "--base", base, "--base", one), "--base is given twice for all adapters"),
        ((*command[:2], f"--tenant=base={base}", "--base", base), "no tenant .* is an adapter"),
        ((*command, f"--base=base={base}", f"--base={base}"), "whole model, no adapter"),
        ((*command, f"--base=three={base}"), "a base is given for 'three', which is no tenant"),
        (
            (*command, "--base", tmp_path / "none"),
            "no such directory, nor a model in the hub's cache",
        ),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1 and re.search(message, err), err
    assert set(Store.open(path).tenants) == {"one", "base", "two"}


def test_home_directories_in_paths(
    family: Family,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shells leave `~` behind an equals sign as it is."""
    (tmp_path / "base").symlink_to(family.paths["base"])
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = run(capsys, "build", "~/made", "--tenant=a=~/base")
    assert code == 0, err
    assert Store.open(tmp_path / "made").tenants == ("a",)
    assert (
        run(capsys, "inspect", "~/made", "--plot=~/plan.png")[0] == 0
        and (tmp_path / "plan.png").is_file()
    )
    code, _, err = run(capsys, "serve", "~/made", "--api-keys=~/absent")
    assert code == 1 and f"{tmp_path}/absent: cannot be read" in err
    assert run(capsys, "build", "made", "--tenant=a=~nobody-here/base")[0] == 2


def test_generate_prints_ids_or_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with load_engine(store) as engine:
        expected = engine.generate("ana", [5, 6, 7], SamplingParams(max_new_tokens=6))
    arguments = (
        "generate",
        store,
        "--tenant",
        "ana",
        "--prompt-ids",
        "5,6 7",
        "--max-new-tokens",
        6,
    )
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and [int(i) for i in out.split()] == list(expected.token_ids)
    code, out, _ = run(capsys, *arguments, "--json")
    value = json.loads(out)
    assert value["token_ids"] == list(expected.token_ids) and value["finish_reason"] == "length"
    assert set(value["timings"]) == {
        "reconfiguration",
        "ttft",
        "total",
        "hits",
        "misses",
        "queued",
        "preemptions",
    }
    code, out, _ = run(capsys, *arguments, "--temperature", 3, "--seed", 1, "--dtype", "bfloat16")
    assert code == 0 and len(out.split()) == 6


def test_verify_names_the_damaged_file(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Store.open(store)
    damaged = helpers.flip(found, found.tenant("bob").tensors["model.norm.weight"])
    code, out, err = run(capsys, "verify", store)
    assert code == 1
    assert f"{damaged}: content does not match its checksum" in out
    assert "holds bob: model.norm.weight" in out
    assert "1 damaged files; build the store again" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "{new}", "--tenant", "x={none}"], 1, "none: no such directory"),
        (["build", "{new}", "--tenant", "../x={ana}"], 1, "tenant name '../x' is not allowed"),
        (
            ["build", "{new}", "--tenant", "x={ana}", "--budget", "1KiB"],
            1,
            "budget of 1.00 KiB is too small for one tenant",
        ),
        (["build", "{new}", "--tenant", "x={ana}", "--slots", "99"], 1, "99 slots"),
        (["build", "{new}", "--tenant", "x"], 2, "write NAME=CHECKPOINT"),
        (
            ["build", "{new}", "--tenant", "x={ana}", "--slots", "many"],
            2,
            "give a whole number, or all",
        ),
        (["build", "{new}", "--tenant", "x={ana}", "--budget", "60GHz"], 2, "'60GHz' is no size"),
        (
            ["build", "{new}", "--tenant", "x={ana}", "--budget", "1GiB", "--slots", "1"],
            2,
            "not allowed with",
        ),
        (["build", "{new}"], 2, "--tenant"),
        (["inspect", "{none}"], 1, "none: not a store, no such directory"),
        (["inspect", "{store}", "--plot", "{none}/x.png"], 1, "the picture cannot be written"),
        (
            ["generate", "{store}", "--tenant", "nobody", "--prompt-ids", "1"],
            1,
            "no tenant 'nobody' in this store; it holds: base",
        ),
        (
            ["generate", "{store}", "--tenant", "ana", "--prompt", "hello"],
            1,
            "'ana' has no tokenizer",
        ),
        (
            ["generate", "{store}", "--tenant", "ana", "--prompt-ids", "1,999"],
            1,
            "is 999, outside the vocabulary",
        ),
        (
            ["generate", "{store}", "--tenant", "ana", "--prompt-ids", "one"],
            2,
            "write token ids as 1,2,3",
        ),
        (
            ["generate", "{store}", "--tenant", "ana", "--prompt-ids", "1", "--top-p", "2"],
            1,
            "top_p is 2.0",
        ),
        (
            ["generate", "{store}", "--tenant", "ana", "--prompt-ids", "1", "--backend", "jax"],
            1,
            "does not serve family",
        ),
        (["export", "{store}", "--tenant", "ana", "{store}"], 1, "not an empty directory"),
        (["remove", "{store}", "--tenant", "nobody"], 1, "no tenant 'nobody'"),
        (["dance"], 2, "invalid choice: 'dance'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_and_exit_codes(
    arguments: list[str],
    code: int,
    message: str,
    store: Path,
    family: Family,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = helpers.fingerprint(store.parent)
    places = {
        "new": store.parent / "new",
        "none": store.parent / "none",
        "store": store,
        "ana": family.paths["ana"],
    }
    found, out, err = run(capsys, *(a.format(**places) for a in arguments))
    assert found == code and message in err, (found, err)
    assert out == "" or arguments[0] == "inspect"
    assert "Traceback" not in err
    assert helpers.fingerprint(store.parent) == before


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"lm-eval"}))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and f"usage: moetel {name}" in out


@pytest.mark.parametrize(
    "module",
    [
        "scripts.cli",
        "scripts.demo",
        "benchmarks.quality",
        pytest.param("benchmarks.material.train_demo", marks=pytest.mark.slow),
        pytest.param("benchmarks.material.train_text", marks=pytest.mark.slow),
        pytest.param("benchmarks.material.train_switch_demo", marks=pytest.mark.slow),
    ],
)
def test_what_runs_as_a_module_has_help(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=helpers.REPOSITORY)
    assert out.returncode == 0 and "usage: " in out.stdout


def test_the_console_command_is_installed() -> None:
    command = [str(Path(sys.executable).with_name("moetel")), "--version"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("moetel 0.")


@pytest.mark.slow
def test_the_demo_answers_from_a_shared_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.demo import __main__ as demo
    from scripts.demo.number_words import LANGUAGES, expected, held_out

    if not (demo.EXAMPLES / "fr" / "model.safetensors").exists():
        pytest.fail(f"{demo.EXAMPLES} lacks the shipped tenants")
    path = tmp_path / "demo"
    assert demo.main(["--store", str(path), "--score", "30", "--family", "mixtral"]) == 0
    # Not calibrated: that compiles every layer of the JAX engine, and tests/benchmarks does it
    # once.
    arguments = [
        "--store",
        str(path),
        "--score",
        "30",
        "--family",
        "switch",
        "--policy",
        "round_robin",
    ]
    assert demo.main(arguments) == 0
    out = capsys.readouterr().out
    for name, family in (("demo", "mixtral"), ("demo-switch", "switch_transformers")):
        store = Store.open(tmp_path / name)
        assert store.tenants == LANGUAGES and store.family.name == family
        assert np.all(store.plan.copies_per_position == 1)
        assert f"{family}: numbers that no tenant saw" in out
    assert "as separate models" in out and "(" in out
    for language in LANGUAGES:
        right = re.findall(rf"^{language}: (\d+) of 30 held-out numbers right", out, re.MULTILINE)
        assert len(right) == 2 and all(int(n) >= 24 for n in right)
        assert out.count(expected(held_out(30)[0], language)) >= 4  # answer and expectation, twice
