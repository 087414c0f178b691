"""Offer the jobs of the command line to Python programs.

``import fedbags`` hands these names on, and loads this module only when one of them is used. Everything here
calls one function of the module that does the work. Mistakes raise UserError, as they end a command.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from common.config import RunConfig, Scalar
from common.errors import RunError
from common.hierarchy import Hierarchy
from deploy.compare import run as comparison
from deploy.configuration import RunRequest
from deploy.datasets import build as datasets
from deploy.datasets.counts import CountedFiles, build_counted_site, read_counted_bags
from deploy.datasets.options import Division, PathLike, SourceOptions, SyntheticHospitals
from deploy.datasets.site_check import check_site as describe_site
from deploy.datasets.synthetic import synthetic_source
from deploy.explain import GRAD_CAM
from deploy.figures.draw import draw_figures
from deploy.report import files as report_files
from deploy.runs.predict import Classifier
from deploy.runs.reading import read_summary
from deploy.simulation import simulate as simulation


@dataclass(frozen=True)
class Run:
    """Stand for one finished run, by its folder.

    Attributes:
        path: the run folder.
    """

    path: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return read_summary(self.path).to_dict()

    @cached_property
    def config(self) -> RunConfig:
        """The configuration that repeats the run."""
        return RunConfig.from_toml(self.path / "config.toml")

    @cached_property
    def classifier(self) -> Classifier:
        """The trained model, read from disk at the first use."""
        return Classifier.load(self.path)

    @property
    def hierarchy(self) -> Hierarchy:
        """The label tree of the model."""
        return self.classifier.model.hierarchy

    def predict(
        self,
        images: Sequence[PathLike | Image.Image | NDArray[Any]],
        *,
        codes: int = 0,
        evidence: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Classify images in memory, or image files and folders of them.

        Args:
            images: either paths (images of any format that training reads, DICOM, folders), or pictures of
                Pillow and arrays of shape (H, W) or (H, W, 3); not both in one call.
            codes: dictionary atoms to list per level.
            evidence: names of what the model's blocks and heads tell of their decision, such as ``codes``.

        Returns:
            One dict an image, in order: ``image`` (the path, or the number in ``images``), ``levels`` (the
            best class of each level with its probability), ``path`` (the best path from root to leaf),
            ``path_probability_product`` and ``codes``; and where it was asked for ``evidence``, by name and
            level the values as nested lists.

        Raises:
            UserError: the model or an image cannot be read, every bad image is listed; or the model has no
                such evidence.
        """
        paths = [Path(image) for image in images if isinstance(image, str | Path)]
        if paths and len(paths) < len(images):
            raise TypeError("give paths, or images in memory, in one call")
        if paths:
            return self.classifier.predict_files(paths, codes, evidence).rows
        in_memory = [image for image in images if not isinstance(image, str | Path)]
        numbers = [str(number) for number in range(len(in_memory))]
        return self.classifier.predict_images(in_memory, numbers, codes, evidence)

    def figures(self, out: PathLike | None = None, *, explainer: str = GRAD_CAM) -> list[Path]:
        """Draw every picture that the run has the data for, and return the files.

        Args:
            out: folder for the pictures; ``figures`` in the run folder if None.
            explainer: whose maps activation.png shows.

        Raises:
            UserError: the run is unfinished or damaged, there is no such explainer, or a picture cannot be
                written.
        """
        return draw_figures([self.path], None if out is None else Path(out), explainer)


def load_run(path: PathLike) -> Run:
    """Open a finished run by its folder.

    Raises:
        UserError: there is no finished run.
    """
    run = Run(Path(path))
    # Read now, so that a wrong folder is named here and not at the first use.
    run.summary  # noqa: B018
    return run


def build_sites(
    out: PathLike,
    source: SourceOptions | SyntheticHospitals,
    division: Division | None = None,
    *,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make the site folders of several hospitals from images with labels, or of synthetic hospitals.

    Args:
        out: folder to make, with a site folder per site; it must not exist.
        source: where images and labels are, or which hospitals to draw.
        division: into sites and bags; ``Division()`` if None, and for synthetic hospitals a site per hospital
            and a bag per session.
        skip_bad: leave bad rows out, and list them in ``out/quarantine.csv``.
        progress: called with (done, all); every image counts once for checking, once for writing.

    Returns:
        The report of the build, as ``fedbags bags build --json`` prints it.

    Raises:
        DataError: bad rows, all of them; nothing was written.
        UserError: a wrong option, ``out`` exists or cannot be written, or too few images.
    """
    if isinstance(source, SyntheticHospitals):
        table, usual = synthetic_source(source), source.division
    else:
        table, usual = datasets.open_source(source), Division()
    report = datasets.build_sites(table, Path(out), division or usual, skip_bad=skip_bad, progress=progress)
    return report.to_dict()


def build_site(  # noqa: PLR0913 (a program names the few that it needs)
    images: PathLike,
    counts: PathLike,
    hierarchy: PathLike,
    *,
    name: str,
    out: PathLike,
    bags: PathLike | None = None,
    minimum_bag_size: int = 4,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Make the site folder of one hospital that has counts and no labels.

    Args:
        images: a folder with one folder of images per bag; any folder if ``bags`` says which is which.
        counts: a table with columns bag, label, count, or bag and one column per class.
        hierarchy: the label tree as CSV, one row per leaf.
        name: of the site, which is also its folder below ``out``.
        out: folder of site folders; made if missing.
        bags: a table with columns image, bag.
        minimum_bag_size: no smaller bag is taken, and the site's policy will refuse them.
        skip_bad: leave out every bag with a fault, and list the faults in quarantine.csv.

    Returns:
        The report of the build, as ``fedbags bags build --json`` prints it.

    Raises:
        DataError: faults in the tables or images, all of them; nothing was written.
        UserError: the folder exists or cannot be written.
    """
    files = CountedFiles(Path(images), Path(counts), Path(hierarchy), None if bags is None else Path(bags))
    found = read_counted_bags(files, minimum_bag_size=minimum_bag_size)
    report = build_counted_site(found, Path(out), name, skip_bad=skip_bad)
    return report.to_dict()


def check_site(site: PathLike, *, image_size: int = 64) -> dict[str, Any]:
    """Describe what a site folder holds and exactly what would leave it.

    Args:
        site: the site folder.
        image_size: side of the model's input, pixels.

    Raises:
        DataError: bad rows, all of them.
    """
    return describe_site(Path(site), image_size)


def simulate(  # noqa: PLR0913 (a program names the few that it needs)
    out: PathLike,
    *,
    sites: PathLike | None = None,
    epsilon: float | None = None,
    settings: Mapping[str, Scalar] | None = None,
    workers: int | None = None,
    resume: bool = False,
    figures: bool = False,
) -> Run:
    """Train on simulated sites on this machine, and return the finished run.

    Guard the call with ``if __name__ == "__main__":`` in a script, because worker processes import it anew.

    Args:
        out: the run folder.
        sites: a folder of site folders; synthetic hospitals are drawn if None.
        epsilon: train with bag-level differential privacy (replace-one, per site, over the whole run).
        settings: keys of the configuration, such as ``{"rounds": 3}``; ``fedbags config`` lists them.
        workers: worker processes; as many as cores if None, 0 for none.
        resume: go on with the run in ``out``.
        figures: draw the pictures at the end, and write the report of a private run.

    Raises:
        UserError: faulty settings or data; nothing was started.
        RunError: the run failed.
    """
    options = dict(settings or {})
    if sites is not None:
        options["sites-dir"] = str(sites)
    if epsilon is not None:
        options["dp.epsilon"] = epsilon
    request = RunRequest(options, out=Path(out), resume=resume)
    simulation.simulate(request, workers=workers, figures=figures, quiet=True)
    return load_run(out)


def predict(
    run: PathLike, images: Sequence[PathLike | Image.Image | NDArray[Any]], *, codes: int = 0
) -> list[dict[str, Any]]:
    """Classify images with the model of a run; see ``Run.predict``."""
    return load_run(run).predict(images, codes=codes)


def compare(scenario: PathLike, out: PathLike, *, only: str = "*", jobs: int | None = None) -> dict[str, Any]:
    """Train every cell of a comparison that is not done, and return the content of table.json.

    Args:
        scenario: the TOML file that names methods, bags, seeds and data.
        out: folder of the comparison; what is done there is kept.
        only: a pattern (``*`` and ``?``): cells of other names are not trained.
        jobs: cells at once; as many as cores if None.

    Raises:
        UserError: a faulty scenario or faulty data.
        RunError: cells failed; their names and the ends of their logs.
    """
    outcome = comparison.compare(Path(scenario), Path(out), comparison.Request(only=only), jobs=jobs)
    if outcome.failed:
        raise RunError("\n".join(f"{name}: {end}" for name, end in outcome.failed.items()))
    return outcome.table


def report(sources: PathLike | Sequence[PathLike], out: PathLike) -> dict[str, Any]:
    """Write the privacy-budget report of run folders and ledgers, and return what it found.

    Args:
        sources: run folders, and ledgers of sites.
        out: folder for report.html, report.json and report.schema.json.

    Returns:
        ``{html, json, schema, pdf, status, headline, worst, problems}``.

    Raises:
        UserError: a source is missing or unreadable, or ``out`` cannot be written.
    """
    listed = [sources] if isinstance(sources, str | Path) else sources
    return report_files.report([Path(source) for source in listed], Path(out))
