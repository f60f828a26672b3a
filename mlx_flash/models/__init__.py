"""What computes around the FFN."""
