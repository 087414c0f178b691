"""Measure the time of `fedbags --help`, and list the heavy packages that the ClientApp imports.

python benchmarks/start_up.py [--json] [--repeats 5]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HEAVY = ("opacus", "matplotlib", "sklearn", "torchmetrics", "pydicom", "dp_accounting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    program = shutil.which("fedbags", path=str(Path(sys.executable).parent)) or "fedbags"
    seconds = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        subprocess.run([program, "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    code = f"import client.app, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    result = {"help_seconds": statistics.median(seconds), "client_imports": loaded.strip()}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"fedbags --help: {result['help_seconds']:.2f} s; client loads of {HEAVY}: {loaded.strip()}")


if __name__ == "__main__":
    main()
