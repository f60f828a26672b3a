"""`mlx_flash bench`."""
