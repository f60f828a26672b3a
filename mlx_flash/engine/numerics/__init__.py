"""Numbers in memory: casting, quantisation, compiled functions."""
