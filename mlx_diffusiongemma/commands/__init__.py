"""The verbs of `mlx-dg`, one file each. Everything heavy is imported inside them, so that `--help` answers at once."""
