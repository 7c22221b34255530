"""Moetel on Ray Serve: `import_path: moetel.ray:build`."""

from scripts.ray.application import build

__all__ = ["build"]
