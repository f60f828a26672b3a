"""`mlx_flash calibrate`."""
