"""`mlx_flash relufy`."""
