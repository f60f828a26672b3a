"""Bundles on flash: their layout, files that hold them, and readers that fetch them."""
