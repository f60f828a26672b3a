"""Decoders on the numpy backend."""
