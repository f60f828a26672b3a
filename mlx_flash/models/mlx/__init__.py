"""mlx-lm's models with FFNs that read from flash. Needs mlx-lm."""
