"""Calibration: learns from a text what lossy selectors need."""
