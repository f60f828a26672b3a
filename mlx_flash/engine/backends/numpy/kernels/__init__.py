"""What decoding spends its time in: compiled with Numba, or in plain NumPy."""
