"""The PyTorch engine: decoders on CUDA and CPU."""

from torch_engine.options import TorchOptions

__all__ = ["TorchOptions"]
