"""A node that a test's server asks whatever it likes: any message type, configuration and model."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict

from client.app import app
from client.site import _SECRET_FILE, SiteConfig, SitePolicy
from common.config import RunConfig
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.model_file import all_arrays
from common.records import FloatArray, ModelUpdate, Record
from common.secure_aggregation.records import (
    MaskRequest,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    UnmaskRequest,
)
from common.wire import combine, to_records
from deploy.flower.internals import become_server

SIZE = 16
NOW: dict[str, Any] = {"session": "0f" * 16, "round": 1}
PRIVATE: dict[str, Any] = {
    "dp.epsilon": 8.0,
    "dp.steps-per-round": 2,
    "dp.expected-bags": 4.0,
    "dp.delta": 1e-3,
    "train.held-back": 0.25,
    "train.optimiser": "sgd",
}
"""What makes a run private."""


def with_policy(site: Path, to: Path, **policy: Any) -> Path:
    """A copy of a site folder under another policy."""
    # A copy is another site: its secret is its own, whoever opened the original before.
    shutil.copytree(site, to, ignore=shutil.ignore_patterns(_SECRET_FILE))
    own = SiteConfig.load(to)
    own.model_copy(update={"policy": SitePolicy.model_validate(policy)}).save(to)
    return to


class Node:
    """A node of a site, real or simulated, in a run whose settings change from question to question."""

    def __init__(self, site: Path, *, simulated: bool = False) -> None:
        self.site, self.simulated = site, simulated
        self.state = RecordDict()
        become_server()

    def context(self, settings: dict[str, Any]) -> Context:
        base = {"model.image-size": SIZE, "model.atoms-per-class": 2, "rounds": 2}
        node: dict[str, Any] = {"data-path": str(self.site)}
        if self.simulated:
            node, base["sites-dir"] = {"partition-id": 0}, str(self.site.parent)
        config = RunConfig().with_changes(base | settings)
        return Context(1, 7, node, self.state, config.to_flat())

    def message(self, kind: str, *records: Record | RecordDict, group: str = "1") -> Message:
        content = combine(*(to_records(r) if isinstance(r, Record) else r for r in records))
        message = Message(content, 7, kind, group_id=group)
        message.metadata.__dict__["_message_id"] = "m"
        return message

    def ask(self, kind: str, *records: Record | RecordDict, **settings: Any) -> Message:
        """Ask, in a run with these settings; a dotted key is written with two underscores."""
        changes = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
        return app(self.message(kind, *records), self.context(changes))

    def arrays(self, settings: dict[str, Any] | None = None) -> dict[str, FloatArray]:
        """The arrays of a fresh model."""
        config = RunConfig.from_flat(self.context(settings or {}).run_config)
        tree = Hierarchy.from_csv(self.site / "hierarchy.csv")
        return all_arrays(build_model(config.model, tree, 0))

    def model(self, settings: dict[str, Any] | None = None, round: int = 1) -> ModelUpdate:
        """A fresh model, as the server sends it."""
        return ModelUpdate(sender="server", round=round, arrays=self.arrays(settings))

    def request(self, kind: str, settings: dict[str, Any] | None = None) -> RecordDict:
        """The records that a question of this type comes with."""
        plan = SessionPlan(**NOW, threshold_share=0.66, neighbours=0, clip_range=16.0, weights={}, adverts=())
        records: dict[str, tuple[Record, ...]] = {
            "query.keys": (SessionOffer(**NOW),),
            "query.shares": (plan,),
            "query.survivors": (SurvivorList(**NOW, survivors=("a",)),),
            "query.unmask": (UnmaskRequest(**NOW, survivors=("a",), signatures={}),),
            "train": (self.model(settings),),
            "train.masked": (self.model(settings), MaskRequest(**NOW, sharing=(), shares={})),
            "evaluate.bags": (self.model(settings),),
            "evaluate.test": (self.model(settings),),
        }
        return to_records(*records.get(kind, ()))


def constant_model(arrays: dict[str, FloatArray], scores: list[np.ndarray]) -> dict[str, FloatArray]:
    """A model of method dllp that answers the same scores for every image.

    Args:
        arrays: of a model of method dllp.
        scores: per level, shape (C_l,).
    """
    changed = dict(arrays)
    for level, wanted in enumerate(scores):
        for name, array in arrays.items():
            if name.startswith(f"heads.{level}."):
                changed[name] = np.zeros_like(array) if array.ndim > 1 else wanted.astype(np.float32)
    return changed
