"""Write the privacy-budget report of runs and ledgers as report.json and one self-contained page.

A report goes one way: ``evidence`` reads the sources, ``accounts`` computes every epsilon, ``figures`` makes
the sites' figures of both, ``prose`` writes the texts, ``files`` puts them together as a ``model.Report``,
and ``page`` makes the page from report.json alone.
"""
