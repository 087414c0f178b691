"""Read finished runs from their folders for drawing, and check which can stand side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from common.errors import UserError
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier
from common.model.model_file import load_model
from common.parts import discover
from common.run_records import RunEvent, RunSummary
from deploy.runs.reading import read_summary, run_events
from server.run_folder import RunFolder

T = TypeVar("T", bound=RunEvent)

_METHOD_TITLES = {
    "lhfglp": "LHFGLP",
    "dllp-hierarchical": "plain pipeline (dllp-hierarchical)",
    "dllp": "plain LLP (dllp)",
}


@dataclass(frozen=True)
class FinishedRun:
    """Hold the parts of one run that the figures need.

    Attributes:
        path: the run folder.
        config: its configuration.
        summary: its summary.json.
        events: the lines of its metrics.jsonl.
        model: the selected model, in evaluation mode.
        confusion: ``argmax`` and ``path``: per level (C_l, C_l) counts, rows the true class; None when
            the run had no labelled test images.
    """

    path: Path
    config: RunConfig
    summary: RunSummary
    events: Sequence[RunEvent]
    model: HierarchicalClassifier
    confusion: dict[str, list[NDArray[np.int64]]] | None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a run folder.

        Raises:
            UserError: it is no run folder, the run has not finished, or a file is damaged.
        """
        discover()
        folder = RunFolder(path)
        if not folder.config.is_file():
            raise UserError(
                f"no run in {path}\nGive a run folder, such as the --out of `fedbags simulate`; "
                "`fedbags runs list` shows them."
            )
        if not folder.summary.is_file():
            raise UserError(
                f"the run in {path} has not finished: it has no {folder.summary.name}\n"
                "Wait for its end, or go on with it: `fedbags simulate --resume` with the same options."
            )
        model, _ = load_model(path)
        try:
            summary = read_summary(path)
            events = run_events(path)
            confusion = None
            if folder.confusion.is_file():
                counts = json.loads(folder.confusion.read_text(encoding="utf-8"))
                confusion = {
                    decoder: [np.asarray(level, dtype=np.int64) for level in counts[decoder]]
                    for decoder in ("argmax", "path")
                }
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"the run folder {path} is damaged: {error}\nCopy it again from where the run was made."
            ) from error
        return cls(path, RunConfig.from_toml(folder.config), summary, events, model, confusion)

    @property
    def tree(self) -> Hierarchy:
        """Return the label tree."""
        return self.model.hierarchy

    @property
    def method(self) -> str:
        """Return the method's name as titles write it."""
        return _METHOD_TITLES.get(self.config.model.method, self.config.model.method)

    @property
    def name(self) -> str:
        """Return the name of the run folder."""
        return self.path.resolve().name

    @property
    def selected_round(self) -> int:
        """Return the round whose model was kept."""
        return self.summary.selected_round

    def of(self, kind: type[T]) -> list[T]:
        """Return the events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]


def open_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Read runs that share one label tree.

    Raises:
        UserError: see FinishedRun.open; or their trees differ, so they cannot stand side by side.
    """
    runs = [FinishedRun.open(path) for path in paths]
    for run in runs[1:]:
        if run.tree != runs[0].tree:
            raise UserError(
                f"{run.path} and {runs[0].path} have different label trees\n"
                "Draw them one by one: side by side stand only runs on the same classes."
            )
    return runs


def labels(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a short name for each run, which is its method, with its folder where methods are equal."""
    methods = [run.method for run in runs]
    return [
        method if methods.count(method) == 1 else f"{method}, {run.name}"
        for method, run in zip(methods, runs, strict=True)
    ]


def title(what: str, runs: Sequence[FinishedRun]) -> str:
    """Return the title of a figure, which names what it shows and the runs and rounds of it.

    The title of a single run also names its method.
    """
    named = [f"run {run.name}, round {run.selected_round} of {run.summary.rounds}" for run in runs]
    if len(runs) == 1:
        return f"{what}\n{runs[0].method}, {named[0]}"
    lines = [" · ".join(named[start : start + 3]) for start in range(0, len(named), 3)]
    return "\n".join([what, *lines])
