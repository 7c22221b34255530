"""Layers of the model: what every tenant has of its own."""
