"""Hold what sites and the coordinator agree on."""
