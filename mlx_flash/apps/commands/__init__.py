"""The commands of `mlx_flash`, a file each: its arguments, and what runs. `cli.py` has the list."""
