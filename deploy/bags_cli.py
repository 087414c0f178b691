"""`fedbags bags`: from images and labels to site folders. Thin: reads options, shows progress, prints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from client.sources.catalogue import SourceKind, open_source

if TYPE_CHECKING:  # these import NumPy and torch; the help must not wait for them
    from client.image_cache import Progress as ProgressCallback
    from client.sources.report import BuildReport

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
    split_column: Annotated[
        str | None, typer.Option(help="Column whose 'test' rows become test.csv.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column (patient, lesion) that is never divided over sites.")
    ] = None,
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
        str | None, typer.Option(help="random (default), column:NAME (a bag holds one value), similarity.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the result.")] = 0,
    images_per_site: Annotated[int, typer.Option(min=1, help="Synthetic only.")] = 1200,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Synthetic only, pixels.")] = 48,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out; they go to OUT/quarantine.csv.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Divide labelled images into sites and bags; write counts per bag, and no label of a training image.

    Example, from an ISIC-style table:

    \b
        fedbags bags build --source table --images PBC/images \\
            --labels PBC/metadata.csv --hierarchy PBC/hierarchy.csv \\
            --split-column split --bag-size 16 --sites 5 \\
            --partition dirichlet:0.5 --out SITES

    Then look at a site with `fedbags site check SITES/site-1`, and train with
    `fedbags simulate --sites-dir SITES`.
    """
    from client.sources.build import build_sites  # imports torch: not for --help

    table = open_source(
        source,
        images=images,
        labels=labels,
        hierarchy=hierarchy,
        label_column=label_column,
        sites=sites or 5,
        seed=seed,
        images_per_site=images_per_site,
        image_size=image_size,
        bag_size=bag_size,
    )
    usual = ("iid", "random")
    if source is SourceKind.SYNTHETIC:
        from client.sources.synthetic import SYNTHETIC_BAGS, SYNTHETIC_PARTITION

        usual = (SYNTHETIC_PARTITION, SYNTHETIC_BAGS)
    with _progress_bar() as progress:
        report = build_sites(
            table,
            out,
            bag_size=bag_size,
            sites=sites,
            partition=partition or usual[0],
            bags=bags or usual[1],
            group_column=group_column,
            groups=groups,
            split_column=split_column,
            seed=seed,
            skip_bad=skip_bad,
            minimum_bag_size=minimum_bag_size,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)


@contextmanager
def _progress_bar() -> "Iterator[ProgressCallback]":
    from deploy.tables import console, text_column

    columns = (text_column("checking and writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(report: "BuildReport") -> None:
    from deploy.tables import console

    table = Table(title=f"{report.out}: {report.used} of {report.listed} images used")
    table.add_column("site")
    for name in ("bags", "images", "images per bag", "test images"):
        table.add_column(name, justify="right")
    for site in report.sites:
        sizes = f"{site.bag_size_min} / {site.bag_size_mean:g} / {site.bag_size_max}"
        table.add_row(site.name, str(site.bags), str(site.images), sizes, str(site.test_images))
    table.caption = "images per bag: fewest / mean / most"
    screen = console()
    screen.print(table)
    for note in report.notes:
        screen.print(f"Note: {note}")
    if report.quarantined:
        screen.print(f"{report.quarantined} bad row(s) left out: {report.out / 'quarantine.csv'}")
