"""Train every method of a scenario at every bag size, seed and setting, and write a table of results."""
