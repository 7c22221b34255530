"""`moetel`, what users import: the same names as `common`, and a plain error beside another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import common
import moetel
from tests.helpers import REPOSITORY


def test_it_gives_what_common_gives() -> None:
    assert sorted(moetel.__all__) == sorted(common.__all__)
    assert all(getattr(moetel, name) is getattr(common, name) for name in moetel.__all__)


def test_another_package_called_common_is_named(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPOSITORY)!r}]; import moetel"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 1
    assert f"'common' is found at {tmp_path}/common" in out.stderr
    assert "rename that folder" in out.stderr


def test_one_that_was_imported_before_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, types; sys.modules['common'] = types.ModuleType('common'); "
        f"sys.path.insert(0, {str(REPOSITORY)!r}); import moetel"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 1 and "another module called 'common'" in out.stderr
