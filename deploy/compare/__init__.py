"""``fedbags compare``: methods x bag sizes x seeds x settings, each as a run of its own, to one table.

Modules: scenario (what a file may say), cells (the runs it means), data (the site folders they train on),
cell (one run in a process of its own), scoring (its selected model on the test images), queue (many at
once, stopped and taken up again), table (rows and their means), plots.
"""
