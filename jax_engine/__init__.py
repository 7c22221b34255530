"""The JAX/Flax engine: Switch Transformer on CPU and on a mesh of accelerators."""

from jax_engine.options import JaxOptions

__all__ = ["JaxOptions"]
