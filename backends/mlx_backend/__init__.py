"""MLX: Apple silicon, CUDA and the CPU."""
