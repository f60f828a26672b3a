"""From a Hugging Face checkpoint to a flash checkpoint."""
