"""Text to token ids and back, and which token comes next."""
