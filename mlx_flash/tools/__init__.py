"""What makes and measures checkpoints."""
