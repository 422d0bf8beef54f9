"""MLX: Apple silicon, CUDA and the CPU."""

from backends.mlx_backend.session import describe, open, probe

__all__ = ["describe", "open", "probe"]
