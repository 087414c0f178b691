"""Train on simulated sites on this machine."""
