"""Moetel: many fine-tuned Mixture-of-Experts models on one device, from one set of experts.

This package only re-exports; what it gives is defined in `common`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _check_common() -> None:
    """Raises ImportError where another package called `common` stands before Moetel's."""
    own = Path(__file__).resolve().parent.parent / "common"
    mend = "rename that folder or module, or start Python in another directory"
    loaded = sys.modules.get("common")
    if loaded is not None and getattr(loaded, "__file__", None) is None:
        raise ImportError(
            f"Moetel's package 'common' is {own}, but another module called 'common' "
            f"({loaded!r}) was imported first; {mend}"
        )
    found = importlib.util.find_spec("common")
    at = None if found is None or found.origin is None else Path(found.origin).resolve()
    if at != own / "__init__.py":
        raise ImportError(
            f"Moetel's package 'common' is {own}, but 'common' is found at {at}; {mend}"
        )


_check_common()

from common import *  # noqa: E402, F403
from common import __all__ as __all__  # noqa: E402
