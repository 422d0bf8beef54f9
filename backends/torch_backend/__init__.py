"""PyTorch with bitsandbytes: CUDA, MPS and the CPU."""
