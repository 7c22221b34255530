"""The model in Flax NNX."""
