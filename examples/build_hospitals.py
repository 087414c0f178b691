"""Make hospitals to simulate, from a folder of images with labels.

    python examples/build_hospitals.py IMAGES OUT

IMAGES has a folder per class, nested from coarse to fine. Each hospital gets bags with counts per class, and
its site folder holds no label of a single image. What would leave such a hospital is printed at the end.
"""

import sys
from pathlib import Path

import fedbags


def main(images: str, out: str) -> None:
    """Build two hospitals with unlike class mixes below the folder ``out``, and describe them."""
    source = fedbags.SourceOptions("folders", images=Path(images))
    division = fedbags.Division(bag_size=8, sites=2, partition="dirichlet:0.5", seed=1)
    built = fedbags.build_sites(out, source, division)
    for site in built["sites"]:
        print(f"{site['name']}: {site['bags']} bags of {site['bag_size_mean']:g} images on average")
    for note in built["notes"]:
        print(f"note: {note}")
    leaves = fedbags.check_site(Path(out) / built["sites"][0]["name"], image_size=16)["leaves"]
    print(f"what leaves: label counts ({leaves['proportion_release']}), updates ({leaves['model_update']})")


if __name__ == "__main__":
    main(*sys.argv[1:])
