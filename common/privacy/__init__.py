"""What is claimed about privacy, and how it is kept: units, events, accounting, noise, and the one plan."""
