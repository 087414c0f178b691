"""Read what a private run spent, from the report's JSON.

    python examples/read_a_report.py RUN OUT

Every figure of the page stands in report.json with its unit, adjacency, delta and accountant.
"""

import json
import sys
from pathlib import Path

import fedbags


def main(run: str, out: str) -> None:
    """Write the report of a run, and print what each site has spent."""
    written = fedbags.report(run, out)
    print(written["headline"])
    page = json.loads(Path(written["json"]).read_text(encoding="utf-8"))
    for name, site in page["sites"].items():
        print(f"{name}: epsilon {site['epsilon']:.3f} at delta {site['delta']}, of one {site['unit']}")
    print(f"the whole report: {written['html']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
