"""The model in Flax NNX, built from a shape and filled by roles."""
