"""Train every method of a scenario at every bag size, seed and setting, and write a table of results.

Modules: scenario (reads and checks the scenario file), cells (expands it into one cell per model), data
(reads the images and writes the site folders that the cells train on), plan (finds the cells that are done
and runs the others), cell (trains one model in its own process), scoring (evaluates it on the test images),
run (the whole comparison), table, plots and screen (the output).
"""
