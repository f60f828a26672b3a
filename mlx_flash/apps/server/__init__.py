"""`mlx_flash server`."""
