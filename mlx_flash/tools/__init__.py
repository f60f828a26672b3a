"""Tools that make checkpoints and measure them."""
