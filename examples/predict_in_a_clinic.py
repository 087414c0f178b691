"""Classify images that a clinic's own program holds in memory.

    python examples/predict_in_a_clinic.py RUN

The pictures here are made up; in a clinic they come from a camera or an archive. The model is read once.
"""

import sys

import numpy as np

import fedbags


def main(path: str) -> None:
    """Print the best path of two pictures, and what happens to one that is no picture."""
    run = fedbags.load_run(path)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]
    for row in run.predict(pictures):
        print(f"{row['image']}: {' > '.join(row['path'])} ({row['path_probability_product']:.2f})")
    try:
        run.predict([np.zeros((3, 3, 3, 3), dtype=np.uint8)])
    except fedbags.UserError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
