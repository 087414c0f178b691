"""Write the results of a comparison as one row per cell, and as means over the seeds.

The rows are written to JSON and CSV, the means to Markdown. The module reads result files only, and knows
nothing of how they were made.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import writable
from common.files import write_text
from deploy.compare.plan import RESULT, of_probes

FIGURES = ("accuracy", "balanced_accuracy", "macro_f1")
_COSTS = ("proportion_l1", "seconds", "memory_mb")
_JSON, _CSV, _MARKDOWN = "table.json", "table.csv", "table.md"

_NOTE = """\
Accuracy, balanced accuracy and macro-F1 are of the same test images everywhere: the mean, and after ± the
standard deviation, over the seeds (with one seed there is none). Every level is scored by the method's best
reading: its own argmax, the best root-to-leaf path, or the leaves' probabilities summed up the tree;
table.csv says which. L1 is between the predicted and the true leaf proportions of held-back bags, in [0, 2];
it depends on the size of the bags, so compare it at one bag size. Seconds and MB are of one process, on a
machine that others may use."""
_NOTE_OF_PROBES = "Columns such as NAME.FIGURE are figures of the probe NAME."

Row = dict[str, Any]


@dataclass(frozen=True)
class Statistic:
    """Hold a mean over seeds, and the standard deviation where there are two or more."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        """Return the statistic of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int) -> str:
        """Return a text such as ``0.612 ±0.010``."""
        spread = "" if self.deviation is None else f" ±{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Line:
    """Summarise one method at one bag size in one setting, over its seeds.

    ``setting`` distinguishes the two lines of local-only: the mean over the sites and the best site.
    ``levels`` maps a level's name to its ``_FIGURES``, ``costs`` has those of ``_COSTS`` that are known,
    ``probes`` the figures of probes by column, such as ``recall.leaf@1``.
    """

    method: str
    bag_size: int
    setting: str
    passes: tuple[int, ...]
    seeds: int
    levels: dict[str, dict[str, Statistic]]
    costs: dict[str, Statistic]
    probes: dict[str, Statistic]


def read_rows(runs: Iterable[Path], probes: Sequence[str] = ()) -> list[Row]:
    """Return the results of the folders that have one, in their order, with the figures of these probes."""
    rows = [json.loads((run / RESULT).read_text(encoding="utf-8")) for run in runs if (run / RESULT).exists()]
    for row in rows:
        if figures := of_probes(row.pop("probes", {}), probes):
            row["probes"] = figures
    return rows


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Return means and deviations over the seeds.

    The lines stand in the order in which settings, bag sizes and methods first appear in the rows.
    """
    groups: dict[tuple[str, int, str], dict[int, list[Row]]] = {}
    for row in rows:
        seeds = groups.setdefault((row["setting"], row["bag_size"], row["method"]), {})
        seeds.setdefault(row["seed"], []).append(row)
    lines = []
    for (setting, bag_size, method), seeds in groups.items():
        by_seed = list(seeds.values())
        if "site" not in by_seed[0][0]:
            lines.append(_line(method, bag_size, setting, [_mean(sites) for sites in by_seed]))
            continue
        number = max(len(sites) for sites in by_seed)
        # Left out: a seed without all of its sites, because a mean over fewer sites is another quantity.
        by_seed = [sites for sites in by_seed if len(sites) == number]
        best = [max(sites, key=lambda row: row["levels"][-1]["accuracy"]) for sites in by_seed]
        lines.append(
            _line(method, bag_size, f"{setting}, mean of {number} sites", [_mean(sites) for sites in by_seed])
        )
        lines.append(_line(method, bag_size, f"{setting}, best site", best))
    return lines


def _mean(rows: Sequence[Row]) -> Row:
    """Return the mean of several rows of one seed, as one row."""
    first = rows[0]
    levels = [
        {
            "name": level["name"],
            **{key: statistics.fmean(row["levels"][number][key] for row in rows) for key in FIGURES},
        }
        for number, level in enumerate(first["levels"])
    ]
    known = {key: [row[key] for row in rows if row.get(key) is not None] for key in _COSTS}
    costs = {key: statistics.fmean(values) if values else None for key, values in known.items()}
    probes = {column: statistics.fmean(values) for column, values in _of_probes(rows).items()}
    return {**first, "levels": levels, **costs, "probes": probes}


def _of_probes(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the figures of probes by column, of the rows that have them."""
    columns = dict.fromkeys(column for row in rows for column in row.get("probes", {}))
    return {
        column: [row["probes"][column] for row in rows if column in row.get("probes", {})]
        for column in columns
    }


def _line(method: str, bag_size: int, setting: str, rows: Sequence[Row]) -> Line:
    names = [level["name"] for level in rows[0]["levels"]]
    known = {key: [row[key] for row in rows if row.get(key) is not None] for key in _COSTS}
    return Line(
        method=method,
        bag_size=bag_size,
        setting=setting,
        passes=tuple(sorted({row["passes"] for row in rows})),
        seeds=len(rows),
        levels={
            name: {key: Statistic.of([row["levels"][number][key] for row in rows]) for key in FIGURES}
            for number, name in enumerate(names)
        },
        costs={key: Statistic.of(values) for key, values in known.items() if values},
        probes={column: Statistic.of(values) for column, values in _of_probes(rows).items()},
    )


def write_table(out: Path, title: str, rows: Sequence[Row], missing: Sequence[str]) -> dict[str, Any]:
    """Write table.json, table.csv and table.md.

    Args:
        out: the comparison's folder.
        title: of the scenario.
        rows: of the cells that are done.
        missing: names of those that are not.

    Returns:
        The content of table.json.

    Raises:
        UserError: a file cannot be written.
    """
    commits = sorted({row["commit"] or "unknown" for row in rows})
    content = {"title": title, "commit": ", ".join(commits), "missing": list(missing), "rows": list(rows)}
    texts = {
        _JSON: json.dumps(content, indent=2) + "\n",
        _CSV: _to_csv(rows),
        _MARKDOWN: _to_markdown(title, rows, missing, commits),
    }
    for name, text in texts.items():
        with writable(out / name):
            write_text(out / name, text)
    return content


def _to_csv(rows: Sequence[Row]) -> str:
    """Return one line per row, where the scores of level ``NAME`` are columns such as ``NAME.accuracy``."""
    flat = [_flat(row) for row in rows]
    header = list(dict.fromkeys(key for row in flat for key in row))
    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, header, lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    return stream.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if key not in ("levels", "probes")}
    for level in row["levels"]:
        flat |= {f"{level['name']}.{key}": level[key] for key in (*FIGURES, "reading")}
    flat |= row.get("probes", {})
    return flat


def _to_markdown(title: str, rows: Sequence[Row], missing: Sequence[str], commits: Sequence[str]) -> str:
    """Return two Markdown tables per setting.

    The first has accuracies and costs, the second balanced accuracies and macro-F1.
    """
    text = [f"# {title or 'Comparison'}", ""]
    if missing:
        text += [f"{len(missing)} cell(s) are not in it: {', '.join(missing)}", ""]
    lines = summarise(rows)
    for setting in dict.fromkeys(line.setting for line in lines):
        chosen = [line for line in lines if line.setting == setting]
        names = list(dict.fromkeys(name for line in chosen for name in line.levels))
        text += [f"## {setting[0].upper()}{setting[1:]}", ""]
        header, body = accuracy_grid(chosen)
        passes = ["-".join(map(str, line.passes)) for line in chosen]
        text += _grid([*header, "passes"], [[*cells, last] for cells, last in zip(body, passes, strict=True)])
        others = [(key, name) for key in FIGURES[1:] for name in names]
        header = ["method", "bag", *(f"{key.replace('_', ' ')}: {name}" for key, name in others)]
        body = [
            [line.method, str(line.bag_size), *(line.levels[name][key].text(3) for key, name in others)]
            for line in chosen
        ]
        text += _grid(header, body)
    notes = [_NOTE, _NOTE_OF_PROBES] if any(line.probes for line in lines) else [_NOTE]
    text += [*notes, "", f"Code: {', '.join(commits) or 'unknown'}.", ""]
    return "\n".join(text)


def accuracy_grid(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return column names, and per line the texts of accuracies, of figures of probes and of costs."""
    names = list(dict.fromkeys(name for line in lines for name in line.levels))
    probes = list(dict.fromkeys(column for line in lines for column in line.probes))

    def cost(line: Line, key: str, digits: int) -> str:
        return f"{line.costs[key].mean:.{digits}f}" if key in line.costs else "-"

    body = [
        [
            line.method,
            str(line.bag_size),
            str(line.seeds),
            *(line.levels[name]["accuracy"].text(3) for name in names),
            *(line.probes[column].text(3) if column in line.probes else "-" for column in probes),
            cost(line, "proportion_l1", 3),
            cost(line, "seconds", 0),
            cost(line, "memory_mb", 0),
        ]
        for line in lines
    ]
    return ["method", "bag", "seeds", *names, *probes, "L1", "s", "MB"], body


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---", *["---:"] * (len(header) - 1)]
    return [*(f"| {' | '.join(cells)} |" for cells in (header, rules, *body)), ""]
