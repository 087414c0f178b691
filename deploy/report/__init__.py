"""Write the privacy-budget report of runs and ledgers as report.json and one self-contained page.

``collect`` reads the sources, ``accounts`` computes every epsilon, ``assemble`` makes the sites' figures of
both, ``prose`` and ``disclosures`` write the texts, and ``render`` makes the page from report.json alone.
"""
