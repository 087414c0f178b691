"""Train on simulated hospitals, and look at what came out.

    python examples/simulate_hospitals.py OUT

Draws five small synthetic hospitals, trains a few rounds, and prints the accuracies of each level beside the
time it took. With a folder of site folders of your own, give it as ``sites``.
"""

import sys

import fedbags


def main(out: str) -> None:
    """Simulate into the folder ``out`` and print the result."""
    # Few and small: an example answers in seconds. `fedbags config` lists every key with its bounds.
    settings = {"rounds": 2, "federation.sites": 2, "model.image-size": 16, "model.atoms-per-class": 2}
    run = fedbags.simulate(out, settings=settings, workers=0)
    for level in run.summary["levels"]:
        print(f"{level['name']:10} {level['classes']:3} classes  accuracy {level['accuracy']:.3f}")
    print(f"{run.config.rounds} rounds in {run.summary['seconds']:.0f} s, in {run.path}")


if __name__ == "__main__":  # worker processes import this file anew
    main(sys.argv[1])
