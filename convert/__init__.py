"""Published checkpoints become quantized MLX arrays."""
