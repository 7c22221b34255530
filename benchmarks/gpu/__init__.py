"""The suite for CUDA cards: `python -m benchmarks.gpu`."""
