"""Arithmetic on slots, one folder per array library."""
