"""A writer that dies at any one of its steps leaves the old store or none: every step is tried,
without chance.

`test_kill.py` kills whole processes at random moments; here a child process ends itself, as SIGKILL
would, right before the n-th thing that it does to the file system, for every n. Python's audit
events name those things.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import checkpoints, helpers

# Runs without torch, so that hundreds of forks cost little. Prints how often each outcome was seen.
DRIVER = """
import json, os, shutil, sys
from pathlib import Path
from common import Store, add_tenant, build_store, extend_store, pack_store, remove_tenant

place, case, checkpoints = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
a, b, c = checkpoints
path = place / "store"
spare = Path(f"{place}-spare")
os.fsync = lambda fd: None  # a killed process loses nothing that it wrote; only a dead machine does
build_store(spare, {"a": a, "b": b}, slots=1)


def prepare():
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if case not in ("new", "pack"):
        shutil.copytree(spare, path)


def change():
    if case == "add":
        add_tenant(path, "c", c)
    elif case == "remove":
        remove_tenant(path, "a")
    elif case == "extend":
        extend_store(path, "c", c, extra=0.5)
    elif case == "pack":
        pack_store(Store.open(spare), path)
    elif case == "leave":
        remove_tenant(path, "a", keep_plan=True)
    else:
        build_store(path, {"b": b, "c": c}, slots="all")


def dies_at(step):
    count = 0
    dying = False

    def hook(event, arguments):
        nonlocal count, dying
        if dying:
            return
        emptied = None
        if event == "open":  # fsync opens what it flushes, so what the library wrote has its step too
            file, mode, _ = arguments
            touches = str(place) in str(file)
            emptied = file if mode and "w" in mode else None
        else:
            touches = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if touches:
            if count == step:
                os._exit(9)
            if emptied is not None and count + 1 == step:  # it was opened, and nothing written yet
                dying = True
                open(emptied, "w").close()
                os._exit(9)
            count += 1 if emptied is None else 2

    return hook


def state():
    if not path.exists():
        return None
    store = Store.open(path)
    assert store.verify() == [], store.verify()
    return [list(store.tenants), store.plan.to_json()]


prepare()
old = state()
change()
new = state()
outcomes = {"old": 0, "new": 0}
step = 0
while True:
    prepare()
    child = os.fork()
    if child == 0:
        sys.addaudithook(dies_at(step))
        change()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    found = state()
    assert found in (old, new), (step, found)
    outcomes["new" if found == new else "old"] += 1
    if status == 0:
        break
    if found == old:
        change()
    else:
        build_store(path, {"b": b, "c": c})
    again = Store.open(path)
    assert again.verify() == [], step
    assert again.objects.unreferenced(set(again.manifest.objects)) == [], step
    assert {p.name for p in (path / "assets").iterdir()} == {t.assets_folder for t in again.manifest.tenants}, step
    assert [p.name for p in place.iterdir()] == ["store"], step
    assert not list(path.rglob("*.partial")), step
    step += 1
print(json.dumps(outcomes | {"steps": step}))
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("case", ["new", "replace", "add", "remove", "extend", "leave", "pack"])
def test_dying_before_any_step(case: str, tmp_path: Path) -> None:
    base = checkpoints.random_mixtral(
        0, num_hidden_layers=1, num_local_experts=2, hidden_size=8, intermediate_size=8
    )
    paths = [
        checkpoints.save(checkpoints.tuned(base, i), tmp_path / name)
        for i, name in enumerate("abc")
    ]
    # In memory where there is such a place: hundreds of stores are written.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=memory if os.access(memory, os.W_OK) else tmp_path
    ) as root:
        command = [sys.executable, "-c", DRIVER, f"{root}/place", case, *map(str, paths)]
        out = subprocess.run(command, capture_output=True, text=True, cwd=helpers.REPOSITORY)
    assert out.returncode == 0, out.stderr[-3000:]
    outcomes = json.loads(out.stdout)
    # Many steps, most of them before the one that makes the change happen; the last run was let
    # through.
    assert (
        outcomes["steps"] > 10 and outcomes["old"] > outcomes["steps"] / 3 and outcomes["new"] > 1
    ), outcomes
