"""What a run needs and how its budget is split, decided before anything is loaded."""
