"""PyTorch with bitsandbytes: CUDA, MPS and the CPU."""

from backends.torch_backend.session import describe, open, probe

__all__ = ["describe", "open", "probe"]
