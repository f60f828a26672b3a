"""Measurements of this machine, and of a model that runs on it."""
