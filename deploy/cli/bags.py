"""Turn images and labels into site folders, for ``fedbags bags``.

Reads options, shows progress and prints. ``deploy.datasets`` does the work.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from click.core import ParameterSource

from common.errors import UserError
from deploy.cli import print_json
from deploy.datasets.options import Division, SourceKind, SourceOptions, SyntheticHospitals
from deploy.lazy import lazy_imports

with lazy_imports():
    from deploy.cli import terminal
    from deploy.datasets import build as building
    from deploy.datasets import counts as counted_bags
    from deploy.datasets import site_writer

_COUNTS_READS = frozenset(
    {"out", "source", "images", "counts", "hierarchy", "bags", "name"}
    | {"minimum_bag_size", "fold_case", "skip_bad", "as_json"}
)
"""The options of ``--source counts``; any other that is given is refused."""

app = typer.Typer(
    help="Turn images with labels into site folders of bags.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def bags() -> None:
    """Turn images with labels into site folders of bags."""


@app.command()
def build(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder to make, with one site folder per site.")],
    source: Annotated[SourceKind, typer.Option(help="What the images come as.")] = SourceKind.TABLE,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images (table, dicom), root of the data set, or .npz (medmnist, archive)."
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Label table (table, dicom).")] = None,
    hierarchy: Annotated[
        Path | None, typer.Option(help="Label tree as CSV, one row per leaf (table, dicom, medmnist).")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of leaf labels; default diagnosis_1..k, or HAM10000's dx.")
    ] = None,
    levels: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many of diagnosis_1..k.")
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column whose 'test' rows become test.csv.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column (patient, lesion) that is never divided over sites.")
    ] = None,
    missing_groups: Annotated[
        str, typer.Option(help="Rows without a group: refuse, or alone: each a group of its own.")
    ] = "refuse",
    groups: Annotated[
        str, typer.Option(help="bags: nor over bags. sites: the bags of a site are filled without regard.")
    ] = "bags",
    bag_size: Annotated[int, typer.Option(min=1, help="Images per bag.")] = 16,
    minimum_bag_size: Annotated[int, typer.Option(min=1, help="Images; no smaller bag is made.")] = 4,
    sites: Annotated[int | None, typer.Option(min=1, help="Number of sites; 5 unless a column says.")] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="iid (default), dirichlet:ALPHA (small ALPHA: uneven mixes) or column:NAME."),
    ] = None,
    bags: Annotated[
        str | None,
        typer.Option(
            help="random (default), column:NAME (a bag holds one value), similarity; with counts a table "
            "image,bag."
        ),
    ] = None,
    counts: Annotated[
        Path | None, typer.Option(help="Counts per bag and class, long or wide (counts).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the site to add to OUT (counts).")] = None,
    fold_case: Annotated[
        bool, typer.Option("--fold-case", help="Join labels that differ by case or blanks only.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the result.")] = 0,
    images_per_site: Annotated[int, typer.Option(min=1, help="Synthetic only.")] = 1200,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Synthetic only, pixels.")] = 48,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out; they go to OUT/quarantine.csv.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write site folders of bags with images and counts per bag, and no label of a training image.

    A hospital with one folder of images per bag, and counts per bag in a table, adds its own site folder:

    \b
        fedbags bags build --source counts --images BAGS --counts counts.csv \\
            --hierarchy hierarchy.csv --name hospital-1 --out SITES

    Labelled images are divided into sites and bags, here by an ISIC-style table:

    \b
        fedbags bags build --source table --images PBC/images \\
            --labels PBC/metadata.csv --hierarchy PBC/hierarchy.csv \\
            --split-column split --bag-size 16 --sites 5 \\
            --partition dirichlet:0.5 --out SITES

    Then `fedbags site check SITES/site-1` shows a site, and `fedbags simulate --sites-dir SITES` trains.
    """
    if source is SourceKind.COUNTS:
        _refuse_unread(context, source, sorted(context.params.keys() - _COUNTS_READS))
        if images is None or counts is None or hierarchy is None or name is None:
            raise UserError("--source counts needs --images, --counts, --hierarchy and --name")
        files = counted_bags.CountedFiles(images, counts, hierarchy, Path(bags) if bags else None)
        found = counted_bags.read_counted_bags(files, minimum_bag_size=minimum_bag_size, fold_case=fold_case)
        with terminal.counted("checking and writing", transient=True) as progress:
            made = counted_bags.build_counted_site(found, out, name, skip_bad=skip_bad, progress=progress)
        _show(made, as_json)
        return
    _refuse_unread(context, source, ("counts", "name"))
    options = SourceOptions(source, images, labels, hierarchy, label_column, levels, fold_case)
    hospitals = SyntheticHospitals(
        sites or 5, seed, images_per_site, image_size, images_per_site // 5, session_size=bag_size
    )
    usual = hospitals.division if source is SourceKind.SYNTHETIC else Division()
    division = Division(
        bag_size=bag_size,
        minimum_bag_size=minimum_bag_size,
        sites=sites,
        partition=partition or usual.partition,
        bags=bags or usual.bags,
        group_column=group_column,
        groups=groups,
        missing_groups=missing_groups,
        split_column=split_column,
        seed=seed,
    )
    table = building.open_source(options, hospitals)
    with terminal.counted("checking and writing", transient=True) as progress:
        report = building.build_sites(table, out, division, skip_bad=skip_bad, progress=progress)
    _show(report, as_json)


def _refuse_unread(context: typer.Context, source: SourceKind, options: Iterable[str]) -> None:
    """Refuse options that were given and that the source does not read.

    Raises:
        UserError: names the options.
    """
    # Defaults are not refused: every option has one, and only what the user wrote was meant.
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        counted = " (--source counts does)" if "--counts" in names else ""
        raise UserError(f"--source {source} does not read {names}{counted}")


def _show(report: "site_writer.BuildReport", as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)


def _print(report: "site_writer.BuildReport") -> None:

    title = f"{report.out}: {report.used} of {report.listed} images used"
    table = terminal.table(title, "site", "bags", "images", "images per bag", "test images")
    for site in report.sites:
        sizes = f"{site.bag_size_min} / {site.bag_size_mean:g} / {site.bag_size_max}"
        table.add_row(site.name, str(site.bags), str(site.images), sizes, str(site.test_images))
    table.caption = "images per bag: fewest / mean / most"
    screen = terminal.console()
    screen.print(table)
    for note in report.notes:
        screen.print(f"Note: {note}")
    if report.quarantined:
        screen.print(f"{report.quarantined} bad row(s) left out: {report.out / 'quarantine.csv'}")
