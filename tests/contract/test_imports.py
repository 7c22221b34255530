"""The floors of the house: a file imports from floors below its own, and nothing in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import REPOSITORY

# From the top down. A file imports from its own package and from floors below. Packages of one
# floor do not import one another.
FLOORS = (
    ("moetel",),
    ("scripts",),
    ("common.build", "torch_engine", "jax_engine"),
    ("common.serving", "common.planning"),
    ("common.store",),
    ("common.plan",),
    ("common.checkpoints",),
    ("common.families",),
    ("common.kernels",),
)
FACES = ("common", "moetel")
PACKAGES = ("common", "torch_engine", "jax_engine", "scripts", "moetel")


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, wherever in the file it does so."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import; write the whole name"
                yield str(node.module)  # which runs, also where a module of it is imported
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    return {name for name in names() if name in modules}


MODULES = {
    module_name(path): path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")
}
IMPORTS = {name: imported(path, MODULES) - {name} for name, path in MODULES.items()}


def floor(module: str) -> tuple[int, str]:
    """Number of a module's floor, the top one largest, and its package on it; -1: the ground."""
    for number, packages in enumerate(reversed(FLOORS)):
        for package in packages:
            if module == package or module.startswith(f"{package}."):
                return number, package
    return -1, module


def test_no_file_imports_upwards_or_across() -> None:
    wrong = []
    for module, others in IMPORTS.items():
        mine, package = floor(module)
        for other in others:
            theirs, neighbour = floor(other)
            across = theirs == mine >= 0 and package != neighbour
            if module not in FACES and other not in FACES and (theirs > mine or across):
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_faces_are_for_users() -> None:
    """What `common` re-exports is imported from where it is defined, below the commands."""
    wrong = [
        f"{module} imports {face}"
        for module, others in IMPORTS.items()
        for face in FACES
        if face in others and floor(module)[1] not in ("scripts", "moetel")
    ]
    assert not wrong, "\n".join(wrong)


def circles() -> list[list[str]]:
    """Groups of modules that import one another (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in IMPORTS[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            at = stack.index(module)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for module in IMPORTS:
        if module not in index:
            visit(module)
    return found


def test_no_circle() -> None:
    assert circles() == []


def test_the_graph_is_not_empty() -> None:
    """Else the tests above would pass for want of files."""
    assert "common.families" in IMPORTS["common.store.manifest"]
    assert len(MODULES) > 100
