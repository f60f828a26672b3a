"""What stays in memory: slots, the window that decides which bundles keep one, staging for those that have none."""
