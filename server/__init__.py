"""Hold the app of the coordinator."""
