"""The mlx backend. Needs mlx."""
