"""Experts: the pool of copies, and tokens through it."""
