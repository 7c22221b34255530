"""Layers of the model: what a tenant has of its own."""
