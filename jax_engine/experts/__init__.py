"""Experts: the router, the pool of copies, and tokens through it."""
