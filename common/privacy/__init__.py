"""Define the units, events, accounting, noise and plan of differential privacy."""
