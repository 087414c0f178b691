"""Hold the app of a hospital, which it approves by hash."""
