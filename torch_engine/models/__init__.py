"""Shapes of models that the engine computes."""
