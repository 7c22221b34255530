"""What a build measured before it was stopped, so that the same build goes on there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from common.build.calibration import calibrate
from common.build.examples import CalibrationSet
from common.plan.profile import Profile
from common.planning.measurements import MeasurementsFile
from common.progress import Progress
from common.store import unfinished
from common.store.profiles import profile_of
from common.store.store import Store
from common.version import __version__


class Unfinished:
    """Profiles and measurements in a folder of the directory that is written to."""

    def __init__(self, directory: Path):
        self._folder = unfinished.folder_of(directory)

    @property
    def measurements(self) -> MeasurementsFile:
        return MeasurementsFile(self._folder / "measurements.safetensors")

    def calibrate(
        self, store: Store, sets: Mapping[str, CalibrationSet], progress: Progress
    ) -> dict[str, Profile]:
        """As `calibrate`, but for tenants that were calibrated before. Inputs stay in their files,
        as they take gigabytes."""
        paths = {name: self._path(store, name, examples) for name, examples in sets.items()}
        found = {name: p for name, path in paths.items() if (p := _read(path, store))}

        def keep(name: str, profile: Profile) -> Profile:
            unfinished.write(paths[name], profile.to_json)
            kept = _read(paths[name], store)
            assert kept is not None
            return kept

        missing = {name: examples for name, examples in sets.items() if name not in found}
        if missing:
            found |= calibrate(store, missing, progress=progress, keep=keep)
        return {name: found[name] for name in sets}

    def _path(self, store: Store, name: str, examples: CalibrationSet) -> Path:
        """Named by all that a profile rests on: sensitivities need the other tenants' experts."""
        tensors = [[t.name, dict(t.tensors)] for t in store.manifest.tenants]
        basis = [__version__, store.dtype, name, tensors, asdict(examples)]
        digest = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
        return self._folder / f"profile-{digest[:24]}.safetensors"


def _read(path: Path, store: Store) -> Profile | None:
    found = unfinished.read(path)
    if found is None:
        return None
    about, refs = found
    return profile_of(about, store.experts, lambda name: refs[name].map())
