"""Show what a site holds and exactly what would leave it, for ``fedbags site check``.

A site with a budget in its site.toml takes part in private runs only, so its table shows those; one without
takes part in the others only.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from client.data.bags import BagStore
from client.data.labelled import LabelledImages
from client.release import IN_REPLY, may_leave, release_proportions
from client.session import with_own_split
from client.site import KNOWN_METRICS, SitePolicy
from common.config import RunConfig
from deploy.cli.terminal import console, counted, table


def check_site(site: Path, image_size: int, *, skip_bad: bool = False) -> dict[str, Any]:
    """Open a site as training would and list what is there and what would be sent.

    Raises:
        UserError: the folder is not a usable site; every bad row is named.
    """
    with counted(f"reading {site.name}") as progress:
        store = BagStore.open(site, image_size, skip_bad=skip_bad, progress=progress)
        test = LabelledImages.open(site, image_size, skip_bad=skip_bad, progress=progress)
    release = release_proportions(store, "not-sent")
    policy = store.config.policy
    private = policy.budget.epsilon is not None
    # With a budget only noised counts leave, so the exact ones are not what would be sent.
    total = release.total() if not private else None
    metrics = sorted(_metrics_that_leave(store, site, private=private))
    return {
        "site": store.name,
        "data_version": store.data_version,
        "bags": {
            "used": len(store),
            "listed": store.summary.bags_listed,
            "smallest": int(store.bag_sizes.min()),
            "mean": float(store.bag_sizes.mean()),
            "largest": int(store.bag_sizes.max()),
        },
        "images": {
            "used": store.summary.used,
            "listed": store.summary.listed,
            "converted": store.summary.converted,
            "resized": store.summary.resized,
            "quarantined": store.summary.quarantined,
        },
        "test_images": len(test.labels) if test is not None else 0,
        "levels": [
            {"name": name, "classes": size}
            for name, size in zip(store.hierarchy.levels, store.hierarchy.sizes, strict=True)
        ],
        "leaves": {
            "proportion_release": release.granularity,
            "mechanism": "discrete-laplace" if private and release.leaf_counts else release.mechanism,
            "private": private or release.is_private,
            "label_counts": dict(zip(store.hierarchy.classes[-1], total.tolist(), strict=True))
            if total is not None
            else None,
            "class_names": True,
            "number_of_bags": True,
            "bag_sizes": release.granularity == "per-bag",
            "model_update": _describe_update(policy),
            "metrics": metrics,
            "beyond_default": _beyond_default(policy, metrics),
        },
        "withheld": {
            "metrics": [name for name in KNOWN_METRICS if name not in metrics],
            "always": ["images", "labels of single images", "file names", "patient ids", "bag ids"],
        },
    }


def _metrics_that_leave(store: BagStore, site: Path, *, private: bool) -> set[str]:
    """Return the metrics that the site, as a real one, may send in a run with every default."""
    # A simulated site sends everything, and the question here is what a real one would send.
    terms = store.config.policy.terms(simulated=False)
    config = RunConfig().with_changes({"dp.epsilon": 1.0} if private else {})
    divided = with_own_split(store, site, terms, private=private)
    return set().union(*(may_leave(kind, config, divided, terms) for kind in IN_REPLY))


def _beyond_default(policy: SitePolicy, metrics: Iterable[str]) -> list[str]:
    """Return those of the metrics that the default policy would withhold.

    They tell more of the label counts.
    """
    safe = policy.safe_metrics()
    return [name for name in metrics if name in KNOWN_METRICS and name not in safe]


def say_beyond_default(names: Sequence[str]) -> str:
    """Return a warning about the metrics that a site's own list lets leave and the default withholds."""
    return (
        f"site.toml lets metrics leave that tell more than its label counts do: {', '.join(names)}. "
        "Take `metrics` out of it for the defaults (docs/data.md)."
    )


def _describe_update(policy: SitePolicy) -> str:
    """Describe how a model update is protected when it leaves, as far as the site itself sees to it."""
    budget = policy.budget
    noise = (
        f"noised per bag, charged to the ledger: at most epsilon {budget.epsilon:g} for ever"
        if budget.epsilon is not None
        else "exact: no differential privacy"
    )
    if policy.secure_aggregation.shared_noise and budget.alone_epsilon is not None:
        noise += (
            "; the noise may be shared with other sites of a masked sum: by its own share alone at most "
            f"epsilon {budget.alone_epsilon:g}"
        )
    return f"{noise}; masked, the server sees sums only" if policy.secure_aggregation.required else noise


def print_check(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    bags, images, leaves = result["bags"], result["images"], result["leaves"]
    here = table(f"site {result['site']}: what is here", "what", "figure")
    here.add_row("bags in use", f"{bags['used']} of {bags['listed']}")
    here.add_row("images per bag", f"{bags['smallest']} to {bags['largest']}, mean {bags['mean']:.1f}")
    here.add_row("images in use", f"{images['used']} of {images['listed']}")
    here.add_row("converted to RGB", str(images["converted"]))
    here.add_row("resized", str(images["resized"]))
    here.add_row("quarantined", str(images["quarantined"]))
    here.add_row("labelled test images", str(result["test_images"]))
    for level in result["levels"]:
        here.add_row(f"classes of level {level['name']}", str(level["classes"]))
    here.add_row("data version", result["data_version"][:16])
    out = table("what would leave the building", "what", "when", "protection")
    noise = "noised, charged to the ledger" if leaves["private"] else "none: exact"
    counts = {
        "none": "no label counts",
        "total": "label counts, site total",
        "per-bag": "label counts, per bag",
    }
    out.add_row(
        counts[leaves["proportion_release"]],
        "once per data version",
        noise if leaves["proportion_release"] != "none" else "withheld",
    )
    out.add_row("class names, number of bags", "once per data version", "none")
    out.add_row("model update", "every round", leaves["model_update"])
    for name in leaves["metrics"]:
        noised = name.startswith("noised")
        how = "none, beyond the default" if name in leaves["beyond_default"] else "none"
        out.add_row(f"metric {name}", "every round or evaluation", noise if noised else how)
    for name in result["withheld"]["metrics"]:
        out.add_row(f"metric {name}", "never", "withheld")
    for name in result["withheld"]["always"]:
        out.add_row(name, "never", "no record can carry it")
    console().print(here, out)
    if leaves["beyond_default"]:
        console().print(say_beyond_default(leaves["beyond_default"]))
    if leaves["label_counts"] is not None:
        exact = table("the label counts as they would be sent", "class", "images")
        for name, count in leaves["label_counts"].items():
            exact.add_row(name, f"{count:g}")
        console().print(exact)
