"""Read run folders, and show, serve, mirror and use what they hold."""
