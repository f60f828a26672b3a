"""A run: its plan, loading, generation."""
